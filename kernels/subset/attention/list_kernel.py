"""Attention over live tokens in Triton: first a list of those that a tile of queries sees, then attention over it.

All heads of a stream share the list, and with it the work of leaving out what is dropped: a tile's attention costs
what it sees, wherever in the pages that is. A tile is a block of queries of a row with several, or a row with one
query. Where it is one query, a program takes all query heads of a KV head together.

A list has two parts: tokens that all queries of the tile see stand at its front, and those that some see at its
end. Only the latter need a mask. The places of a block of tokens are looked up a block ahead, so that the K and V
of several blocks are on their way at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...common import LOG2E, masked_page_id, peak_below
from ...launch import Launcher
from ...paged import QUERY_BLOCK, TABLE_CHUNK, Batch, PageTable
from ..pages import NEVER, SubsetPages
from .workspace import SeenTokens

TOKENS_PER_BLOCK = 256
"""The list is made from so many tokens together."""


class Launch(NamedTuple):
    """How attention is compiled: tokens of the list together, query heads of a KV head in a program, warps, and
    pipeline stages of the tokens that all queries see and of the others."""

    block: int
    together: int
    warps: int
    stages: int
    masked_stages: int


def launch(head_dim: int, groups: int, dtype: torch.dtype, several: bool) -> Launch:
    """The launch for a shape; ``several``: a tile has several queries."""
    if not several:
        return Launch(64 if head_dim <= 128 else 32, groups, 4, 3, 2)
    if dtype == torch.float32:  # without tensor cores: larger blocks would not fit into registers
        return Launch(16, 1, 8, 2, 1)
    if head_dim > 128:
        return Launch(32, 1, 8, 3, 2)
    return Launch(64, 1, 4 if head_dim <= 64 else 8, 3, 1)


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
    front = seen + nth_list * seen_stride
    back = front + seen_stride - 1
    seen_by_all, seen_by_some = 0, 0
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
            # A token is never moved to a place before its position.
            by_all = (place <= first_query) & (end > last_query)
            by_some = valid & (end > first_query) & ~by_all
            value = (ids * P + place % P).to(tl.int32)
            both = by_all.to(tl.int32) + (by_some.to(tl.int32) << 16)
            until = tl.cumsum(both, 0)
            tl.store(front + seen_by_all + (until & 0xFFFF) - 1, value, mask=by_all)
            tl.store(back - seen_by_some - (until >> 16) + 1, value, mask=by_some)
            total = tl.sum(both, 0)
            seen_by_all += total & 0xFFFF
            seen_by_some += total >> 16
    tl.store(counts + 2 * nth_list, seen_by_all)
    tl.store(counts + 2 * nth_list + 1, seen_by_some)


@triton.jit
def _rows(
    k_pages, v_pages, scale_pages, place, listed, head, dtype,
    PAGE: tl.constexpr, PAGE_SCALES: tl.constexpr, P: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K and V of a block of tokens, and the factors of their logits; ``listed`` counts if they are masked."""
    dim = tl.arange(0, BLOCK_D)
    page, offset = (place // P).to(tl.int64), place % P
    here = (page * PAGE + (offset * H + head) * D)[:, None] + dim[None, :]
    factor = 1.0
    if MASKED:
        there = listed[:, None] & (dim < D)[None, :]
        k, v = tl.load(k_pages + here, mask=there, other=0.0), tl.load(v_pages + here, mask=there, other=0.0)
    elif D < BLOCK_D:
        k = tl.load(k_pages + here, mask=(dim < D)[None, :], other=0.0)
        v = tl.load(v_pages + here, mask=(dim < D)[None, :], other=0.0)
    else:
        k, v = tl.load(k_pages + here), tl.load(v_pages + here)
    if SCALED:
        scales = scale_pages + page * PAGE_SCALES + (offset * H + head) * 2
        if MASKED:
            factor, v_factor = tl.load(scales, mask=listed, other=0.0), tl.load(scales + 1, mask=listed, other=0.0)
        else:
            factor, v_factor = tl.load(scales), tl.load(scales + 1)
        factor, k = factor.to(tl.float32), k.to(dtype)
        # Not the weights: small ones times a small scale would underflow in float16.
        v = (v.to(tl.float32) * v_factor.to(tl.float32)[:, None]).to(dtype)
    return k, v, factor


@triton.jit
def _add(query, k, v, logits_bias, factor, peak, mass, value, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax's running peak, sum and value after a block of tokens; ``logits_bias``: 0 or -inf."""
    logits = tl.dot(query, tl.trans(k), input_precision=PRECISION) * factor
    if MASKED:
        logits += logits_bias
    new_peak = tl.maximum(peak, peak_below(tl.max(logits, 1), v.dtype))
    anchor = new_peak
    if MASKED:
        # A query that has seen nothing yet leaves its peak at -inf.
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(logits - anchor[:, None])
    shrink = tl.exp2(peak - anchor)
    mass = mass * shrink + tl.sum(weights, 1)
    value = tl.dot(weights.to(v.dtype), v, value * shrink[:, None], input_precision=PRECISION)
    return new_peak, mass, value


@triton.jit
def _place(places, behind, at, rest, total, N: tl.constexpr):
    """Places of a block of the tokens that are masked: what is left of the list's front, then its end."""
    nth = at + tl.arange(0, N)
    where = tl.where(nth < rest, places + nth, behind - (nth - rest))
    return tl.load(where, mask=nth < total, other=0)


@triton.jit(do_not_specialize=["rows", "tiles", "query_start", "seq_lens", "scale"])
def _attend(
    k_pages, v_pages, begin_pages, end_pages, scale_pages, seen, counts, q, out,
    rows, tiles, query_start, seq_lens, scale,
    seen_stride, q_stride,
    PAGE: tl.constexpr, PAGE_INTS: tl.constexpr, PAGE_SCALES: tl.constexpr, P: tl.constexpr, S: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    NEVER: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
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
    by_all, by_some = tl.load(counts + 2 * nth_list), tl.load(counts + 2 * nth_list + 1)
    places = seen + nth_list * seen_stride
    behind = places + seen_stride - 1
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    base = scale * LOG2E
    # Whole blocks of tokens that all queries see.
    blocks = by_all // BLOCK_N
    place = tl.load(places + n, mask=n < blocks * BLOCK_N, other=0)
    for at in tl.range(0, blocks, num_stages=STAGES):
        k, v, factor = _rows(
            k_pages, v_pages, scale_pages, place, n, head, query.dtype,
            PAGE, PAGE_SCALES, P, H, D, BLOCK_D, SCALED, False,
        )  # fmt: skip
        after = (at + 1) * BLOCK_N + n
        place = tl.load(places + after, mask=after < blocks * BLOCK_N, other=0)
        scaled = base
        if SCALED:
            scaled = (base * factor)[None, :]
        peak, mass, value = _add(query, k, v, 0.0, scaled, peak, mass, value, False, PRECISION)
    # What is left of them, and the tokens that some queries see.
    places += blocks * BLOCK_N
    rest = by_all - blocks * BLOCK_N
    total = rest + by_some
    place = _place(places, behind, 0, rest, total, BLOCK_N)
    for at in tl.range(0, total, BLOCK_N, num_stages=MASKED_STAGES):
        listed, ints = at + n < total, (place // P).to(tl.int64) * PAGE_INTS + place % P
        k, v, factor = _rows(
            k_pages, v_pages, scale_pages, place, listed, head, query.dtype,
            PAGE, PAGE_SCALES, P, H, D, BLOCK_D, SCALED, True,
        )  # fmt: skip
        begin = tl.load(begin_pages + ints, mask=listed, other=NEVER)
        end = tl.load(end_pages + ints, mask=listed, other=0)
        place = _place(places, behind, at + BLOCK_N, rest, total, BLOCK_N)
        visible = (begin[None, :] <= position[:, None]) & (position[:, None] < end[None, :])
        scaled = base
        if SCALED:
            scaled = (base * factor)[None, :]
        bias = tl.where(visible, 0.0, float("-inf"))
        peak, mass, value = _add(query, k, v, bias, scaled, peak, mass, value, True, PRECISION)
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
        block, num_tiles = 1, batch.num_rows
    else:
        assert batch.work is not None
        rows, block, num_tiles = batch.work.rows, QUERY_BLOCK, len(tiles)
    how = launch(dim, group, q.dtype, block > 1)
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
        (num_tiles, streams * heads * group // how.together, 1),
        (pages.k, pages.v, pages.begin, pages.end, scales, places, counts, q, out),
        (rows, tiles, batch.query_start, batch.seq_lens, scale),
        (places.stride(1), q.stride(0)),
        (
            pages.k.stride(0), ints, scales.stride(0), size, streams, heads, group, how.together, dim, block,
            max(16, triton.next_power_of_2(block * how.together)), max(16, triton.next_power_of_2(dim)), how.block,
            NEVER, pages.scales is not None, "ieee" if q.dtype == torch.float32 else "tf32", how.stages,
            how.masked_stages,
        ),
        num_warps=how.warps,
    )  # fmt: skip
