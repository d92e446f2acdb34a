"""Interaction scores and drop times as a Triton kernel.

A program takes blocks of a row's tokens and runs through the queries that come after them: scores never leave it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import masked_page_id
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ..pages import NEVER, SubsetPages

BLOCK_N = 64
"""A program looks at so many tokens of a row together."""
MAX_PROGRAMS_PER_ROW = 16
"""At most so many programs share the tokens of a row."""
MAX_PROGRAMS = 2048
"""Rows are not shared by more programs than make so many in all."""


@triton.jit(do_not_specialize=["query_start", "seq_lens", "slots", "slot_stride", "layer", "max_chunks", "streams",
                               "scale"])  # fmt: skip
def _drop_times(
    int_pages, begin_pages, end_pages, chunk_of, entries, first_live, int_q, bias, below,
    query_start, seq_lens, slots, slot_stride, layer, max_chunks, streams, scale,
    int_stride, below_row, below_stream,
    PAGE: tl.constexpr, PAGE_INTS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BELOW: tl.constexpr, NEVER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program, row, nth = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stream = layer * tl.num_programs(2) + nth
    start, stop = tl.load(query_start + row), tl.load(query_start + row + 1)
    if stop == start:
        return
    slot = tl.load(slots + row * slot_stride)
    length, num_q = tl.load(seq_lens + row), stop - start
    context, newest = length - num_q, (length - 1) // P
    first = tl.minimum(tl.load(first_live + slot.to(tl.int64) * streams + stream), newest)
    offset_bias = tl.load(bias + nth).to(tl.float32)
    n, m, r = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    ends_before = below + row.to(tl.int64) * below_row + nth.to(tl.int64) * below_stream
    for at in range(first * P + program * BLOCK_N, length, tl.num_programs(0) * BLOCK_N):
        place = at + n
        written = place < length
        ids = masked_page_id(chunk_of, entries, slot, stream, place // P, written, max_chunks, streams, CHUNK)
        ints = ids * PAGE_INTS + place % P
        end = tl.load(end_pages + ints, mask=written, other=0)
        live = written & (end > context)
        begin = tl.load(begin_pages + ints, mask=live, other=NEVER)
        keys = tl.load(
            int_pages + (ids * PAGE + place % P * R)[:, None] + r[None, :], mask=live[:, None] & (r < R)[None, :],
            other=0.0,
        )  # fmt: skip
        # No query before the oldest of these tokens drops one; and where none lives, none does.
        oldest = tl.min(begin, 0)
        for q0 in range(tl.maximum(oldest - context, 0) // BLOCK_M * BLOCK_M, num_q, BLOCK_M):
            position = context + q0 + m
            valid = q0 + m < num_q
            queries = tl.load(
                int_q + (start + q0 + m).to(tl.int64)[:, None] * int_stride + nth * R + r[None, :],
                mask=valid[:, None] & (r < R)[None, :], other=0.0,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + offset_bias
            drops = (scores <= 0) & (begin[None, :] < position[:, None]) & valid[:, None]
            end = tl.minimum(end, tl.min(tl.where(drops, position[:, None], NEVER), 0))
        if BELOW:
            if layer > 0:
                end = tl.minimum(end, tl.load(ends_before + begin, mask=live, other=NEVER))
            tl.store(ends_before + begin, end, mask=live)
        tl.store(end_pages + ints, end, mask=live)


_launch = Launcher(_drop_times)


def drop_times(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    int_q: torch.Tensor,
    bias: torch.Tensor,
    below: torch.Tensor | None,
) -> None:
    """See :func:`.reference.drop_times`. ``int_q`` is dense within a token."""
    _, streams, r = int_q.shape
    _launch(
        (max(1, min(MAX_PROGRAMS_PER_ROW, MAX_PROGRAMS // max(1, batch.num_rows))), batch.num_rows, streams),
        (
            pages.int_k, pages.begin, pages.end, table.chunk_of, table.entries, table.first_live, int_q, bias,
            table.first_live if below is None else below,
        ),
        (
            batch.query_start, batch.seq_lens, batch.slots, batch.slots.stride(0), layer,
            table.chunk_of.shape[1], table.entries.shape[1], r**-0.5,
        ),
        (int_q.stride(0), *((0, 0) if below is None else below.stride()[:2])),
        (
            pages.int_k.stride(0), pages.begin.stride(0), pages.page_size, r, TABLE_CHUNK, BLOCK_N,
            16 if batch.work is None else 64, max(16, triton.next_power_of_2(r)), below is not None, NEVER,
            "ieee" if int_q.dtype == torch.float32 else "tf32",
        ),
        num_warps=4 if batch.work is None else 8,
    )  # fmt: skip
