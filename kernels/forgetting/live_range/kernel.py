"""The walk over page totals as a Triton kernel: a program for every (row, stream)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import masked_page_id
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ..pages import LIVE_RANGE_PERIOD, ForgettingPages

PAGES_PER_BLOCK = 64
"""A program looks at so many pages together."""


@triton.jit
def _walk_back(
    gate_pages, chunk_of, entries, threshold, slot, stream, length, first, max_chunks, streams,
    PAGE_BYTES: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GATES: tl.constexpr, CHUNK: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """First live page for the last query of a sequence, of which pages from ``first`` on may be read."""
    last = length - 1
    newest = last // P
    first = tl.minimum(first, newest)
    g = tl.arange(0, GATES)
    limit = tl.load(threshold + stream * G + g, mask=g < G, other=float("inf"))
    carry = tl.zeros([GATES], tl.float32)
    live = 0
    top = newest
    while top >= first:
        page = top - tl.arange(0, W)
        readable = page >= first
        ids = masked_page_id(chunk_of, entries, slot, stream, page, readable, max_chunks, streams, CHUNK)
        # The newest page counts up to the last query only.
        offset = tl.where(page == newest, last % P, P - 1)
        sums = gate_pages + (ids * (PAGE_BYTES // 4) + offset)[:, None] + g[None, :] * P
        added = tl.load(sums, mask=readable[:, None] & (g < G)[None, :], other=0.0)
        decay = carry[None, :] + tl.cumsum(added, 0) - added
        alive = tl.max((decay >= limit[None, :]).to(tl.int32), 1) > 0
        found = tl.sum((readable & (alive | (page == newest))).to(tl.int32), 0)
        live += found
        carry += tl.sum(added, 0)
        # Decay only grows towards older pages: behind a dead one all are dead.
        top = tl.where(found == W, top - W, -1)
    return newest + 1 - live


@triton.jit(
    do_not_specialize=["query_start", "seq_lens", "slots", "slot_stride", "max_chunks", "streams", "unsettled"],
)
def _live_range(
    gate_pages, chunk_of, entries, first_live, threshold, query_start, seq_lens, slots,
    slot_stride, max_chunks, streams, unsettled,
    PAGE_BYTES: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GATES: tl.constexpr, CHUNK: tl.constexpr,
    W: tl.constexpr, PERIOD: tl.constexpr,
):  # fmt: skip
    stream, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row * slot_stride)
    length = tl.load(seq_lens + row)
    num_q = tl.load(query_start + row + 1) - tl.load(query_start + row)
    if (slot == 0) | (num_q == 0) | ((num_q == 1) & (length % PERIOD != 0)):
        return
    remembered = first_live + slot.to(tl.int64) * streams + stream
    before, settled = tl.load(remembered), tl.maximum(length - unsettled, 1)
    page = _walk_back(
        gate_pages, chunk_of, entries, threshold, slot, stream, settled, before, max_chunks, streams,
        PAGE_BYTES, P, G, GATES, CHUNK, W,
    )  # fmt: skip
    tl.store(remembered, tl.maximum(page, before))


@triton.jit(do_not_specialize=["out", "before", "slots", "num_pages", "max_chunks", "streams"])
def _first_live_at(
    gate_pages, chunk_of, entries, threshold, out, before, slots, num_pages, max_chunks, streams,
    PAGE_BYTES: tl.constexpr, P: tl.constexpr, G: tl.constexpr, GATES: tl.constexpr, CHUNK: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    stream, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    at = row.to(tl.int64) * streams + stream
    page = _walk_back(
        gate_pages, chunk_of, entries, threshold, slot, stream, tl.load(num_pages + row) * P, tl.load(before + at),
        max_chunks, streams, PAGE_BYTES, P, G, GATES, CHUNK, W,
    )  # fmt: skip
    tl.store(out + at, page)


_launch, _launch_at = Launcher(_live_range), Launcher(_first_live_at)


def live_range(
    pages: ForgettingPages, table: PageTable, batch: Batch, threshold: torch.Tensor, unsettled: int
) -> None:
    """See :func:`.reference.live_range`."""
    streams, gates = threshold.shape
    _launch(
        (streams, batch.num_rows, 1),
        (pages.gates, table.chunk_of, table.entries, table.first_live, threshold),
        (
            batch.query_start, batch.seq_lens, batch.slots, batch.slots.stride(0), table.chunk_of.shape[1], streams,
            unsettled,
        ),
        (),
        (
            pages.gates.stride(0) * 4, pages.page_size, gates, triton.next_power_of_2(gates), TABLE_CHUNK,
            PAGES_PER_BLOCK, LIVE_RANGE_PERIOD,
        ),
        num_warps=1,
    )  # fmt: skip


def first_live_at(
    pages: ForgettingPages,
    table: PageTable,
    threshold: torch.Tensor,
    *,
    slots: torch.Tensor,
    num_pages: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """See :func:`.reference.first_live_at`."""
    streams, gates = threshold.shape
    out = torch.empty_like(before)
    _launch_at(
        (streams, slots.shape[0], 1),
        (pages.gates, table.chunk_of, table.entries, threshold),
        (out, before, slots, num_pages, table.chunk_of.shape[1], streams),
        (),
        (
            pages.gates.stride(0) * 4, pages.page_size, gates, triton.next_power_of_2(gates), TABLE_CHUNK,
            PAGES_PER_BLOCK,
        ),
        num_warps=1,
    )  # fmt: skip
    return out
