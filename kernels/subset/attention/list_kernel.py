"""Attention over live tokens in Triton: first a list of those that a tile of queries sees, then attention over it.

All heads of a stream share the list, and with it the work of leaving out what is dropped: a tile's attention costs
what it sees, wherever in the pages that is. A tile is a block of queries of a row with several, or a row with one
query. Where it is one query, a program takes all query heads of a KV head together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import LOG2E, masked_page_id
from ...launch import Launcher
from ...paged import QUERY_BLOCK, TABLE_CHUNK, Batch, PageTable
from ..pages import NEVER, SubsetPages
from .workspace import SeenTokens

TOKENS_PER_BLOCK = 256
"""The list is made from so many tokens together."""
BLOCK_N = 64
"""Attention takes so many tokens of the list together."""


@triton.jit
def _tile(rows, tiles, query_start, seq_lens, BLOCK: tl.constexpr):
    """This program's tile: row, first query token, queries (0: nothing to do), position of the first one."""
    tile = tl.program_id(0)
    block = 0
    row = tile
    if BLOCK > 1:
        row = tl.load(rows + tl.load(tiles + 2 * tile))
        block = tl.load(tiles + 2 * tile + 1)
    start, stop = tl.load(query_start + row), tl.load(query_start + row + 1)
    count = tl.minimum(stop - start - block * BLOCK, BLOCK)
    if BLOCK == 1:
        count = tl.where(stop - start == 1, 1, 0)
    first = tl.load(seq_lens + row) - (stop - start) + block * BLOCK
    return row, start + block * BLOCK, count, first


@triton.jit(do_not_specialize=["rows", "tiles", "query_start", "seq_lens", "slots", "slot_stride", "first_stream",
                               "max_chunks", "streams"])  # fmt: skip
def _list(
    end_pages, chunk_of, entries, first_live, seen, counts,
    rows, tiles, query_start, seq_lens, slots, slot_stride, first_stream, max_chunks, streams,
    seen_stride,
    PAGE_INTS: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    tile, stream, n = tl.program_id(0), first_stream + tl.program_id(1), tl.arange(0, N)
    nth_list = (tile * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    row, _, count, first_query = _tile(rows, tiles, query_start, seq_lens, BLOCK)
    found = 0
    if count > 0:
        slot = tl.load(slots + row * slot_stride)
        last_query = first_query + count - 1
        newest = last_query // P
        first = tl.minimum(tl.load(first_live + slot.to(tl.int64) * streams + stream), newest)
        # Places behind the last query are of later tokens.
        for at in range(first * P, last_query + 1, N):
            place = at + n
            valid = place <= last_query
            ids = masked_page_id(chunk_of, entries, slot, stream, place // P, valid, max_chunks, streams, CHUNK)
            ints = ids * PAGE_INTS + place % P
            end = tl.load(end_pages + ints, mask=valid, other=0)
            sees = (valid & (end > first_query)).to(tl.int32)
            rank = found + tl.cumsum(sees, 0) - sees
            where = seen + nth_list * seen_stride + rank
            tl.store(where, (ids * P + place % P).to(tl.int32), mask=sees > 0)
            found += tl.sum(sees, 0)
    tl.store(counts + nth_list, found)


@triton.jit(do_not_specialize=["rows", "tiles", "query_start", "seq_lens", "scale"])
def _attend(
    k_pages, v_pages, begin_pages, end_pages, scale_pages, seen, counts, q, out,
    rows, tiles, query_start, seq_lens, scale,
    seen_stride, q_stride,
    PAGE: tl.constexpr, PAGE_INTS: tl.constexpr, PAGE_SCALES: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    NEVER: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Rows of a block are (query, query head), of TOGETHER query heads of one KV head.
    tile, first_head = tl.program_id(0), tl.program_id(1) * TOGETHER
    stream, head = first_head // (H * G), first_head // G % H
    row, token, num_q, first_query = _tile(rows, tiles, query_start, seq_lens, BLOCK)
    if num_q <= 0:
        return
    m, n, dim = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    tokens, heads = (token + m // TOGETHER).to(tl.int64), first_head + m % TOGETHER
    asked = (m < num_q * TOGETHER)[:, None] & (dim < D)[None, :]
    query = tl.load(q + (tokens * q_stride + heads * D)[:, None] + dim[None, :], mask=asked, other=0.0)
    position = first_query + m // TOGETHER
    nth_list = tile.to(tl.int64) * S + stream
    total = tl.load(counts + nth_list)
    places = seen + nth_list * seen_stride
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, total, BLOCK_N):
        listed = at + n < total
        place = tl.load(places + at + n, mask=listed, other=0)
        page, offset = (place // P).to(tl.int64), place % P
        here = page * PAGE + (offset * H + head) * D
        there = listed[:, None] & (dim < D)[None, :]
        k = tl.load(k_pages + here[:, None] + dim[None, :], mask=there, other=0.0)
        v = tl.load(v_pages + here[:, None] + dim[None, :], mask=there, other=0.0)
        begin = tl.load(begin_pages + page * PAGE_INTS + offset, mask=listed, other=NEVER)
        end = tl.load(end_pages + page * PAGE_INTS + offset, mask=listed, other=0)
        visible = (begin[None, :] <= position[:, None]) & (position[:, None] < end[None, :])
        if SCALED:
            scales = scale_pages + page * PAGE_SCALES + (offset * H + head) * 2
            k_scale = tl.load(scales, mask=listed, other=0.0).to(tl.float32)
            v_scale = tl.load(scales + 1, mask=listed, other=0.0).to(tl.float32)
            k = k.to(query.dtype)
            # Not the weights: small ones times a small scale would underflow in float16.
            v = (v.to(tl.float32) * v_scale[:, None]).to(query.dtype)
        logits = tl.dot(query, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if SCALED:
            logits = logits * k_scale[None, :]
        logits = tl.where(visible, logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        # A query that has seen nothing yet leaves its peak at -inf.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(logits - anchor[:, None])
        shrink = tl.exp2(peak - anchor)
        mass = mass * shrink + tl.sum(weights, 1)
        value = tl.dot(weights.to(v.dtype), v, value * shrink[:, None], input_precision=PRECISION)
        peak = new_peak
    result = value / mass[:, None]
    there = out + (tokens * (S * H * G * D) + heads * D)[:, None] + dim[None, :]
    tl.store(there, result.to(out.dtype.element_ty), mask=asked)


_launch_list, _launch_attend = Launcher(_list), Launcher(_attend)


def attend_lists(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    lists: SeenTokens,
    tiles: torch.Tensor | None,
) -> None:
    """:func:`.reference.subset_attention` of some tiles.

    Args:
        lists: room for the tiles' lists.
        tiles: [t, 2] of the batch's :attr:`~...paged.PrefillWork.tiles`; None: the rows with one query.
    """
    _, streams, heads, group, dim = q.shape
    size, ints = pages.page_size, pages.begin.stride(0)
    if tiles is None:
        rows = tiles = batch.query_start  # not read
        block, num_tiles, together = 1, batch.num_rows, group
    else:
        assert batch.work is not None
        rows, block, num_tiles, together = batch.work.rows, QUERY_BLOCK, len(tiles), 1
    # float32 without tensor cores: larger blocks would not fit into registers.
    exact = q.dtype == torch.float32
    block_n = BLOCK_N // 4 if exact and block > 1 else BLOCK_N if dim <= 128 else BLOCK_N // 2
    scales = pages.end if pages.scales is None else pages.scales  # not read without scales
    places, counts = lists.places, lists.counts
    _launch_list(
        (num_tiles, streams, 1),
        (pages.end, table.chunk_of, table.entries, table.first_live, places, counts),
        (
            rows, tiles, batch.query_start, batch.seq_lens, batch.slots, batch.slots.stride(0), layer * streams,
            table.chunk_of.shape[1], table.entries.shape[1],
        ),
        (places.stride(1),),
        (ints, size, TABLE_CHUNK, block, TOKENS_PER_BLOCK),
        num_warps=4,
    )  # fmt: skip
    _launch_attend(
        (num_tiles, streams * heads * group // together, 1),
        (pages.k, pages.v, pages.begin, pages.end, scales, places, counts, q, out),
        (rows, tiles, batch.query_start, batch.seq_lens, scale),
        (places.stride(1), q.stride(0)),
        (
            pages.k.stride(0), ints, scales.stride(0), size, streams, heads, group, together, dim, block,
            max(16, triton.next_power_of_2(block * together)), max(16, triton.next_power_of_2(dim)), block_n, NEVER,
            pages.scales is not None, "ieee" if exact else "tf32",
        ),
        num_warps=8 if block > 1 else 4,
    )  # fmt: skip
