"""The page table's changes as one Triton kernel: a program for each thing that is new, and block of streams.

A step changes little, so what counts is the host's time: PyTorch's indexing takes several launches for the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launcher
from ..paged import TABLE_CHUNK, PageTable

STREAMS_PER_BLOCK = 256
"""A program writes so many streams."""


@triton.jit(
    do_not_specialize=[
        "opened", "first", "chunk_slot", "chunk_index", "chunk_id", "column_chunk", "column_offset", "ids",
        "num_opened", "num_columns", "max_chunks", "streams",
    ],
)  # fmt: skip
def _table_update(
    chunk_of, entries, first_live,
    opened, first, chunk_slot, chunk_index, chunk_id, column_chunk, column_offset, ids,
    num_opened, num_columns, max_chunks, streams,
    CHUNK: tl.constexpr, STREAMS_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    part, stream = tl.program_id(0), tl.program_id(1) * STREAMS_PER_BLOCK + tl.arange(0, STREAMS_PER_BLOCK)
    inside = stream < streams
    if part < num_columns:
        chunk = tl.load(column_chunk + part).to(tl.int64)
        page = tl.load(ids + part.to(tl.int64) * streams + stream, mask=inside)
        tl.store(entries + (chunk * streams + stream) * CHUNK + tl.load(column_offset + part), page, mask=inside)
    elif part < num_columns + num_opened:
        which = part - num_columns
        slot = tl.load(opened + which).to(tl.int64)
        page = tl.load(first + which.to(tl.int64) * streams + stream, mask=inside)
        tl.store(first_live + slot * streams + stream, page, mask=inside)
    else:
        this = part - num_columns - num_opened
        where = tl.load(chunk_slot + this).to(tl.int64) * max_chunks + tl.load(chunk_index + this)
        tl.store(chunk_of + where, tl.load(chunk_id + this))


_launch = Launcher(_table_update)


def table_update(
    table: PageTable,
    *,
    opened: torch.Tensor,
    first: torch.Tensor,
    chunk_slot: torch.Tensor,
    chunk_index: torch.Tensor,
    chunk_id: torch.Tensor,
    column_chunk: torch.Tensor,
    column_offset: torch.Tensor,
    ids: torch.Tensor,
) -> None:
    """See :func:`.reference.table_update`."""
    streams = table.entries.shape[1]
    begun, chunks, columns = opened.shape[0], chunk_slot.shape[0], column_chunk.shape[0]
    if not begun + chunks + columns:
        return
    _launch(
        (begun + chunks + columns, triton.cdiv(streams, STREAMS_PER_BLOCK), 1),
        (table.chunk_of, table.entries, table.first_live),
        (
            opened, first, chunk_slot, chunk_index, chunk_id, column_chunk, column_offset, ids,
            begun, columns, table.chunk_of.shape[1], streams,
        ),
        (),
        (TABLE_CHUNK, STREAMS_PER_BLOCK),
        num_warps=1,
    )  # fmt: skip
