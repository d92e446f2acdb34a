"""Compaction as a Triton kernel: a program for every (row, stream)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...common import masked_page_id, page_id
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ..pages import SubsetPages

TOKENS_PER_BLOCK = 256
"""So many tokens are counted together."""
PAIRS_PER_BLOCK = 2048
"""So many pairs of a page's tokens and places behind it are matched together."""
BYTES_PER_COPY = 8192
"""So many bytes of K, and of V, are copied together."""
MAX_REGISTERS = 128
"""A thread has at most so many registers: most programs find nothing to move, and more of them fit on a
processor."""


@triton.jit
def _copy(
    k_pages, v_pages, source, target, moved,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """K and V of each token in ``moved`` [n] from an offset in the pool to another."""
    for start in range(0, WIDTH, BLOCK):
        w = start + tl.arange(0, BLOCK)
        mask = moved[:, None] & (w < WIDTH)[None, :]
        here, there = source[:, None] + w[None, :], target[:, None] + w[None, :]
        # Both are on their way before either is waited for.
        k = tl.load(k_pages + here, mask=mask)
        v = tl.load(v_pages + here, mask=mask)
        tl.store(k_pages + there, k, mask=mask)
        tl.store(v_pages + there, v, mask=mask)


@triton.jit
def _copy_rows(pool, source, target, moved, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """WIDTH numbers of each token in ``moved`` [n] from an offset in the pool to another."""
    w = tl.arange(0, BLOCK)
    mask = moved[:, None] & (w < WIDTH)[None, :]
    row = tl.load(pool + source[:, None] + w[None, :], mask=mask)
    tl.store(pool + target[:, None] + w[None, :], row, mask=mask)


@triton.jit
def _free_places(
    end_pages, chunk_of, entries, slot, stream, place, length, max_chunks, streams,
    PAGE_INTS: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Pages of a block of places, and 1 for those of dropped tokens; not for those that are not written yet."""
    written = place < length
    ids = masked_page_id(chunk_of, entries, slot, stream, place // P, written, max_chunks, streams, CHUNK)
    ends = tl.load(end_pages + ids * PAGE_INTS + place % P, mask=written, other=0)
    return ids, (written & (ends <= length)).to(tl.int32)


@triton.jit(do_not_specialize=["query_start", "seq_lens", "slots", "slot_stride", "period", "unsettled",
                               "max_chunks", "streams"])  # fmt: skip
def _compact(
    k_pages, v_pages, int_pages, begin_pages, end_pages, scale_pages, chunk_of, entries, first_live,
    query_start, seq_lens, slots, slot_stride, period, unsettled, max_chunks, streams,
    PAGE: tl.constexpr, PAGE_KEYS: tl.constexpr, PAGE_INTS: tl.constexpr, PAGE_SCALES: tl.constexpr,
    P: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, SCALES: tl.constexpr, CHUNK: tl.constexpr,
    N: tl.constexpr, TARGETS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_SCALES: tl.constexpr,
):  # fmt: skip
    stream, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row * slot_stride)
    new = tl.load(query_start + row + 1) - tl.load(query_start + row)
    length = tl.maximum(tl.load(seq_lens + row) - unsettled, 0)
    if (slot == 0) | (length // period == tl.maximum(length - new, 0) // period):
        return
    newest = (length - 1) // P
    remembered = first_live + slot.to(tl.int64) * streams + stream
    first = tl.minimum(tl.load(remembered), newest)
    room = 0
    n = tl.arange(0, N)
    for at in range(first * P, length, N):
        _, free = _free_places(
            end_pages, chunk_of, entries, slot, stream, at + n, length, max_chunks, streams, PAGE_INTS, P, CHUNK,
        )  # fmt: skip
        room += tl.sum(free, 0)
    # How many of the oldest pages can be emptied. `room` becomes that of all pages behind the one looked at.
    offset = tl.arange(0, P)
    live, behind, searching = 0, first, 1
    while searching > 0:
        page = page_id(chunk_of, entries, slot, stream, behind, max_chunks, streams, CHUNK)
        alive = (tl.load(end_pages + page * PAGE_INTS + offset) > length).to(tl.int32)
        here = tl.sum(alive, 0)
        fits = (behind < newest) & (live + here <= room - (P - here))
        live += tl.where(fits, here, 0)
        room -= tl.where(fits, P - here, 0)
        behind += tl.where(fits, 1, 0)
        searching = tl.where(fits, 1, 0)
    if behind == first:
        return
    # The next live tokens of the emptied pages go to the next free places behind them. Places are free one here
    # and one there, so many are looked at together. What is left of a page and of the places is kept in registers:
    # nothing is read that was written before.
    source, at, t = first, behind * P, tl.arange(0, TARGETS)
    source_page = page_id(chunk_of, entries, slot, stream, source, max_chunks, streams, CHUNK)
    alive = (tl.load(end_pages + source_page * PAGE_INTS + offset) > length).to(tl.int32)
    place = at + t
    ids, vacant = _free_places(
        end_pages, chunk_of, entries, slot, stream, place, length, max_chunks, streams, PAGE_INTS, P, CHUNK,
    )  # fmt: skip
    while source < behind:
        # n-th to n-th: [token of the page, place].
        nth, mth = tl.cumsum(alive, 0), tl.cumsum(vacant, 0)
        pairs = (nth[:, None] == mth[None, :]) & (alive[:, None] * vacant[None, :] > 0)
        moved = tl.max(pairs.to(tl.int32), 1) > 0
        page = tl.sum(tl.where(pairs, ids[None, :], 0), 1)
        to = tl.sum(tl.where(pairs, (place % P)[None, :], 0), 1)
        _copy(
            k_pages, v_pages, source_page * PAGE + offset * WIDTH, page * PAGE + to * WIDTH, moved, WIDTH, BLOCK,
        )  # fmt: skip
        if R > 0:
            _copy_rows(
                int_pages, source_page * PAGE_KEYS + offset * R, page * PAGE_KEYS + to * R, moved, R, BLOCK_R,
            )  # fmt: skip
        if SCALES > 0:
            _copy_rows(
                scale_pages, source_page * PAGE_SCALES + offset * SCALES, page * PAGE_SCALES + to * SCALES, moved,
                SCALES, BLOCK_SCALES,
            )  # fmt: skip
        begin = tl.load(begin_pages + source_page * PAGE_INTS + offset, mask=moved, other=0)
        tl.store(begin_pages + page * PAGE_INTS + to, begin, mask=moved)
        end = tl.load(end_pages + source_page * PAGE_INTS + offset, mask=moved, other=0)
        tl.store(end_pages + page * PAGE_INTS + to, end, mask=moved)
        alive = tl.where(moved, 0, alive)
        vacant = tl.where(tl.max(pairs.to(tl.int32), 0) > 0, 0, vacant)
        if tl.max(alive, 0) == 0:
            source += 1
            source_page = page_id(chunk_of, entries, slot, stream, source, max_chunks, streams, CHUNK)
            alive = (tl.load(end_pages + source_page * PAGE_INTS + offset) > length).to(tl.int32)
        if (tl.max(vacant, 0) == 0) & (at + TARGETS < length):
            at += TARGETS
            place = at + t
            ids, vacant = _free_places(
                end_pages, chunk_of, entries, slot, stream, place, length, max_chunks, streams, PAGE_INTS, P, CHUNK,
            )  # fmt: skip
    tl.store(remembered, behind)


_launch = Launcher(_compact)


def compact(pages: SubsetPages, table: PageTable, batch: Batch, period: int = 1, unsettled: int = 0) -> None:
    """See :func:`.reference.compact`."""
    width, r = pages.k.shape[2] * pages.k.shape[3], pages.int_k.shape[2]
    streams, size, item = table.first_live.shape[1], pages.page_size, pages.k.element_size()
    scales = pages.end if pages.scales is None else pages.scales  # not moved without scales
    per_token = 0 if pages.scales is None else 2 * pages.k.shape[2]
    _launch(
        (streams, batch.num_rows, 1),
        (
            pages.k, pages.v, pages.int_k, pages.begin, pages.end, scales, table.chunk_of, table.entries,
            table.first_live,
        ),
        (
            batch.query_start, batch.seq_lens, batch.slots, batch.slots.stride(0), period, unsettled,
            table.chunk_of.shape[1], streams,
        ),
        (),
        (
            pages.k.stride(0), pages.int_k.stride(0), pages.begin.stride(0), scales.stride(0), size, width, r,
            per_token, TABLE_CHUNK, TOKENS_PER_BLOCK, max(16, PAIRS_PER_BLOCK // size),
            min(triton.next_power_of_2(width), max(16, BYTES_PER_COPY // (size * item))),
            max(1, triton.next_power_of_2(r)), max(1, triton.next_power_of_2(per_token)),
        ),
        num_warps=4, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
