"""Prefill over live pages in Triton: a program for every tile, one query block of one row and query head."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...common import LOG2E, beside_float8, peak_below, take_turn
from ...float8 import FP8
from ...launch import Launcher
from ...paged import QUERY_BLOCK, Batch, PageTable
from ..pages import ForgettingPages
from .plan import LENGTH_CLASSES, PrefillPlan

LANES: tl.constexpr = tl.constexpr(4)
"""So many threads hold a row of a tensor core's result, each of them pairs of columns in turn."""


@triton.jit
def _partial_sums(x):
    """Sums over a row's columns of each thread, [M, LANES] of x [M, N], for which threads exchange nothing."""
    pairs = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * LANES), LANES, 2])
    return tl.sum(tl.sum(pairs, 3), 1)


@triton.jit
def _block(
    query, row_bias, peak, mass, value, keys, values, sums, scales, page_offset, row, start, decay, query_pos,
    length, factor, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One block of keys: the softmax's running peak, sum and value after it. BOUNDED sums are partial ones.

    Weights and values are multiplied in the model's DTYPE, whatever the page's is.
    """
    n, dim = tl.arange(0, BLOCK_N), tl.arange(0, D)
    if TMA:
        k = keys.load([row, 0])
    else:
        where = page_offset + n[:, None] * D + dim[None, :]
        if MASKED:
            k = tl.load(keys + where, mask=(start + n < length)[:, None], other=0.0)
        else:
            k = tl.load(keys + where)
    if MASKED:
        gates = tl.load(sums + n, mask=start + n < length, other=0.0)
    else:
        gates = tl.load(sums + n)
    if SCALED:
        factor = factor * tl.load(scales)
        k = k.to(query.dtype)
    logits = tl.dot(query, tl.trans(k), input_precision=PRECISION)
    logits = logits * factor + ((decay - gates) * LOG2E)[None, :]
    if MASKED:
        logits = tl.where(query_pos[:, None] >= (start + n)[None, :], logits, float("-inf"))
    if BOUNDED:
        if MASKED:
            logits += row_bias[:, None]
        weights = tl.exp2(logits)
        mass += _partial_sums(weights)
    else:
        new_peak = tl.maximum(peak, peak_below(tl.max(logits, 1), DTYPE))
        weights = tl.exp2(logits - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        peak = new_peak
        mass = mass * shrink + tl.sum(weights, 1)
        value = value * shrink[:, None]
    if TMA:
        v = values.load([row, 0])
    elif MASKED:
        v = tl.load(values + where, mask=(start + n < length)[:, None], other=0.0)
    else:
        v = tl.load(values + where)
    if SCALED:
        # Not the weights: small ones times a small scale would underflow in float16.
        v = (v.to(tl.float32) * tl.load(scales + 1)).to(DTYPE)
    value = tl.dot(weights.to(v.dtype), v, value, input_precision=PRECISION)
    return peak, mass, value


@triton.jit(
    do_not_specialize=["query_start", "seq_lens", "rows", "tiles", "order", "histogram", "max_pages", "scale"],
)
def _prefill(
    k_pages, v_pages, gate_pages, scale_pages, ids, before, tile_first, tile_decay, q, out,
    k_rows, v_rows, query_start, seq_lens, rows, tiles, order, histogram, max_pages, scale, q_stride,
    PAGE_BYTES: tl.constexpr, KV_BYTES: tl.constexpr, P: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SORTED: tl.constexpr, SCALED: tl.constexpr,
    TMA: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr, CLASSES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    this_tile = tl.program_id(0)
    if SORTED:
        if this_tile == 0:
            tl.store(histogram + tl.arange(0, CLASSES), 0)
        this_tile = tl.load(order + this_tile)
    tile, query_head = this_tile // (H * G), this_tile % (H * G)
    index, block = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    row = tl.load(rows + index)
    token0 = tl.load(query_start + row)
    num_q = tl.load(query_start + row + 1) - token0
    length = tl.load(seq_lens + row)
    query_index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, D)
    inside = query_index < num_q
    token = (token0 + query_index).to(tl.int64)
    query = tl.load(q + token[:, None] * q_stride + query_head * D + dim[None, :], mask=inside[:, None], other=0.0)
    first_pos = length - num_q + block * BLOCK_M
    query_pos = first_pos + tl.arange(0, BLOCK_M)
    first = tl.load(tile_first + this_tile)
    c, c_rest = tl.load(tile_decay + 2 * this_tile), tl.load(tile_decay + 2 * this_tile + 1)
    ids += (index * H + query_head // G).to(tl.int64) * max_pages
    before += (index * H * G + query_head).to(tl.int64) * max_pages * 2
    sums_offset = (query_head % G) * P

    SUB: tl.constexpr = P // BLOCK_N
    WORDS: tl.constexpr = PAGE_BYTES // 4
    ELEMENTS: tl.constexpr = PAGE_BYTES // KV_BYTES
    ROWS: tl.constexpr = ELEMENTS // D
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if BOUNDED:
        mass = tl.zeros([BLOCK_M, LANES], tl.float32)
    else:
        mass = tl.zeros([BLOCK_M], tl.float32)
    value = tl.zeros([BLOCK_M, D], tl.float32)
    factor = scale * LOG2E
    DTYPE: tl.constexpr = query.dtype
    if SCALED:
        query, factor = beside_float8(query, factor)
    begin = first * SUB
    # Blocks before this one lie wholly before the tile's first query.
    masked_from = tl.maximum((first_pos + 1) // BLOCK_N, begin)
    end = tl.minimum(length - 1, first_pos + BLOCK_M - 1) // BLOCK_N + 1

    for at in tl.range(begin, masked_from, num_stages=STAGES):
        page, sub = at // SUB, at % SUB
        this = tl.load(ids + page).to(tl.int64)
        decay = (c - tl.load(before + 2 * page)) + (c_rest - tl.load(before + 2 * page + 1))
        sums = gate_pages + this * WORDS + sums_offset + sub * BLOCK_N
        if TMA:
            peak, mass, value = _block(
                query, peak, peak, mass, value, k_rows, v_rows, sums, sums, 0,
                (this * ROWS).to(tl.int32) + sub * BLOCK_N, at * BLOCK_N, decay, query_pos, length, factor,
                D, BLOCK_N, False, False, True, BOUNDED, PRECISION, DTYPE,
            )  # fmt: skip
        else:
            peak, mass, value = _block(
                query, peak, peak, mass, value, k_pages, v_pages, sums, scale_pages + this * WORDS,
                this * ELEMENTS + sub * BLOCK_N * D, 0, at * BLOCK_N, decay, query_pos, length, factor,
                D, BLOCK_N, False, SCALED, False, BOUNDED, PRECISION, DTYPE,
            )  # fmt: skip
    row_bias = tl.zeros([BLOCK_M], tl.float32)
    row_bias = peak
    if BOUNDED:
        # So far weights counted decay up to the tile's first query. From there on it differs from row to row.
        own = tl.where(inside, query_pos // P, 0)
        own_id = tl.load(ids + own, mask=inside, other=0).to(tl.int64)
        in_page = tl.load(gate_pages + own_id * WORDS + sums_offset + query_pos % P, mask=inside, other=0.0)
        older = tl.load(before + 2 * own, mask=inside, other=0.0) - c
        row_bias = (older + (tl.load(before + 2 * own + 1, mask=inside, other=0.0) - c_rest) + in_page) * LOG2E
        row_bias = tl.where(inside, row_bias, 0.0)
        passed = tl.exp2(row_bias)
        mass, value = mass * passed[:, None], value * passed[:, None]
    for at in tl.range(masked_from, end, num_stages=MASKED_STAGES):
        page, sub = at // SUB, at % SUB
        this = tl.load(ids + page).to(tl.int64)
        decay = (c - tl.load(before + 2 * page)) + (c_rest - tl.load(before + 2 * page + 1))
        peak, mass, value = _block(
            query, row_bias, peak, mass, value, k_pages, v_pages,
            gate_pages + this * WORDS + sums_offset + sub * BLOCK_N,
            scale_pages + this * WORDS, this * ELEMENTS + sub * BLOCK_N * D, 0, at * BLOCK_N, decay, query_pos,
            length, factor, D, BLOCK_N, True, SCALED, False, BOUNDED, PRECISION, DTYPE,
        )  # fmt: skip
    if BOUNDED:
        mass = tl.sum(mass, 1)
    value = value / mass[:, None]
    tl.store(
        out + token[:, None] * (H * G * D) + query_head * D + dim[None, :], value.to(out.dtype.element_ty),
        mask=inside[:, None],
    )  # fmt: skip


class Launch(NamedTuple):
    """How the kernel is compiled: keys a block, warps, pipeline stages of the two loops, most registers a thread,
    and whether keys come by TMA."""

    block: int
    warps: int
    stages: int
    masked_stages: int
    registers: int | None
    tma: bool


@cache
def _launch(device: torch.device, dim: int, dtype: torch.dtype, scaled: bool, page_size: int) -> Launch:
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    block = min(page_size, 64 if dim <= 128 else 32)
    if dtype == torch.float32:
        return Launch(min(block, 32), 8, 2, 1, None, False)
    return Launch(
        block, 4 if dim <= 64 else 8, 5 if dim <= 128 else 3, 2 if dim <= 64 else 3, None, hopper and not scaled
    )


_launch_prefill = Launcher(_prefill, early=True)

# A pool as two matrices of rows of d, for TMA: from the first page's K on, and from its V on.
_matrices: WeakKeyDictionary[ForgettingPages, tuple[TensorDescriptor, TensorDescriptor]] = WeakKeyDictionary()


def _rows_of(pages: ForgettingPages, block: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    if pages not in _matrices:
        size, dim = pages.k.shape[1:]
        rows = len(pages.k) * pages.gates.stride(0) * 4 // (dim * pages.k.element_size())
        _matrices[pages] = (
            TensorDescriptor(pages.k, [rows, dim], [dim, 1], [block, dim]),
            TensorDescriptor(pages.v, [rows - size, dim], [dim, 1], [block, dim]),
        )
    return _matrices[pages]


def prefill_attention(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    threshold: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    bounded: bool,
    out: torch.Tensor,
    workspace: PrefillPlan | None,
) -> None:
    """See :func:`.reference.prefill_attention`; ``workspace`` is updated for the layer. ``out`` is contiguous,
    ``q`` dense within a token."""
    work, plan = batch.work, workspace
    assert work is not None and plan is not None
    _, heads, groups, dim = q.shape
    scaled = pages.k.dtype == FP8
    plan.update(pages, table, batch, layer, threshold)
    launch = _launch(q.device, dim, q.dtype, scaled, pages.page_size)
    _launch_prefill(
        (len(work.tiles) * heads * groups, 1, 1),
        (
            pages.k, pages.v, pages.gates, pages.gates if pages.scales is None else pages.scales,
            plan.ids, plan.before, plan.tile_first, plan.tile_decay, q, out,
        ),
        (
            *(_rows_of(pages, launch.block) if launch.tma else (pages.k, pages.v)),
            batch.query_start, batch.seq_lens, work.rows, work.tiles,
            plan.tile_first if plan.order is None else plan.order, plan.histogram, work.max_pages,
            scale,
        ),
        (q.stride(0),),
        (
            pages.gates.stride(0) * 4, pages.k.element_size(), pages.page_size, dim, heads, groups, QUERY_BLOCK,
            launch.block, plan.order is not None, scaled, launch.tma, bounded and q.dtype != torch.float16,
            "ieee" if q.dtype == torch.float32 else "tf32", launch.stages, launch.masked_stages,
            LENGTH_CLASSES,
        ),
        num_warps=launch.warps, maxnreg=launch.registers,
    )  # fmt: skip
