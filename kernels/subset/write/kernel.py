"""The page write as a Triton kernel: a program for every (token, stream of the layer)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import page_id, power_of_two_above, row_of
from ...float8 import FP8_MAX
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ..pages import NEVER, Evictions, SubsetPages


@triton.jit
def _store_scaled(
    stored, scales, new, H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    FP8_LARGEST: tl.constexpr,
):  # fmt: skip
    """A token's [H, D] as float8, each head with its own scale."""
    h, dim = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    mask, where = (h < H)[:, None] & (dim < D)[None, :], h[:, None] * D + dim[None, :]
    values = tl.load(new + where, mask=mask, other=0.0).to(tl.float32)
    scale = power_of_two_above(tl.max(tl.abs(values), 1) / FP8_LARGEST)
    tl.store(scales + 2 * h, scale.to(scales.dtype.element_ty), mask=h < H)
    tl.store(stored + where, (values / scale[:, None]).to(tl.float8e4nv), mask=mask)


@triton.jit(do_not_specialize=["query_start", "seq_lens", "slots", "evicts", "slot_stride", "evict_stride",
                               "window", "first", "max_chunks", "streams", "rows"])  # fmt: skip
def _write(
    k_pages, v_pages, int_pages, begin_pages, end_pages, scale_pages, chunk_of, entries, k, v, int_k,
    query_start, seq_lens, slots, evicts, slot_stride, evict_stride, window, first, max_chunks, streams, rows,
    k_stride, v_stride, int_stride,
    PAGE: tl.constexpr, PAGE_KEYS: tl.constexpr, PAGE_INTS: tl.constexpr, PAGE_SCALES: tl.constexpr,
    P: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_R: tl.constexpr,
    NEVER: tl.constexpr, DECIDES: tl.constexpr, LAG: tl.constexpr, SCALED: tl.constexpr, FP8_LARGEST: tl.constexpr,
):  # fmt: skip
    token, nth = tl.program_id(0), tl.program_id(1)
    row = row_of(query_start, rows, token)
    stop = tl.load(query_start + row + 1)
    if token >= stop:  # padding
        return
    position = tl.load(seq_lens + row) - stop + token
    slot = tl.load(slots + row * slot_stride)
    stream, offset = first + nth, position % P
    page = page_id(chunk_of, entries, slot, stream, position // P, max_chunks, streams, CHUNK)
    WIDTH: tl.constexpr = H * D
    at, here = token.to(tl.int64), page * PAGE + offset * WIDTH
    k += at * k_stride + nth * WIDTH
    v += at * v_stride + nth * WIDTH
    if SCALED:
        scales = scale_pages + page * PAGE_SCALES + offset * (2 * H)
        _store_scaled(k_pages + here, scales, k, H, D, BLOCK_H, BLOCK_D, FP8_LARGEST)
        _store_scaled(v_pages + here, scales + 1, v, H, D, BLOCK_H, BLOCK_D, FP8_LARGEST)
    else:
        w = tl.arange(0, BLOCK_WIDTH)
        tl.store(k_pages + here + w, tl.load(k + w, mask=w < WIDTH), mask=w < WIDTH)
        tl.store(v_pages + here + w, tl.load(v + w, mask=w < WIDTH), mask=w < WIDTH)
    if R > 0:
        r = tl.arange(0, BLOCK_R)
        key = tl.load(int_k + at * int_stride + nth * R + r, mask=r < R)
        tl.store(int_pages + page * PAGE_KEYS + offset * R + r, key, mask=r < R)
    tl.store(begin_pages + page * PAGE_INTS + offset, position)
    end = NEVER
    if DECIDES:
        # Every end is written by the program of its token, which looks ahead. Only what the row's first token
        # decides about is of an earlier step.
        decider = token + LAG
        goes = tl.load(evicts + decider.to(tl.int64) * evict_stride + nth, mask=decider < stop, other=0) != 0
        end = tl.where(goes, position + window + 1, NEVER)
        if LAG == 1:
            before = (token == tl.load(query_start + row)) & (position > 0)
            goes = tl.load(evicts + at * evict_stride + nth, mask=before, other=0) != 0
            if before:
                last = page_id(chunk_of, entries, slot, stream, (position - 1) // P, max_chunks, streams, CHUNK)
                # A rejected draft may have decided otherwise.
                tl.store(
                    end_pages + last * PAGE_INTS + (position - 1) % P, tl.where(goes, position + window, NEVER)
                )
    tl.store(end_pages + page * PAGE_INTS + offset, end)


_launch = Launcher(_write)


def subset_write(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    int_k: torch.Tensor | None,
    evictions: Evictions | None = None,
) -> None:
    """See :func:`.reference.subset_write`. Inputs are dense within a token."""
    (_, streams, heads, dim), r = k.shape, pages.int_k.shape[2]
    scales = pages.end if pages.scales is None else pages.scales  # not written without scales
    if int_k is None:
        int_k = k  # not read
    evicts, window, lag = batch.slots, 0, 0  # not read
    if evictions is not None:
        evicts, window, lag = evictions.evicts, evictions.window, evictions.lag
    _launch(
        (batch.num_tokens, streams, 1),
        (
            pages.k, pages.v, pages.int_k, pages.begin, pages.end, scales, table.chunk_of, table.entries, k, v,
            int_k,
        ),
        (
            batch.query_start, batch.seq_lens, batch.slots, evicts, batch.slots.stride(0), evicts.stride(0), window,
            layer * streams, table.chunk_of.shape[1], table.entries.shape[1], batch.num_rows,
        ),
        (k.stride(0), v.stride(0), int_k.stride(0)),
        (
            pages.k.stride(0), pages.int_k.stride(0), pages.begin.stride(0), scales.stride(0), pages.page_size,
            heads, dim, r, TABLE_CHUNK, triton.next_power_of_2(heads), triton.next_power_of_2(dim),
            triton.next_power_of_2(heads * dim), max(1, triton.next_power_of_2(r)), NEVER, evictions is not None,
            lag, pages.scales is not None, FP8_MAX,
        ),
        num_warps=4,
    )  # fmt: skip
