"""The page table's changes in plain PyTorch."""

from __future__ import annotations

import torch

from ..paged import PageTable


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
    """Begin requests, give them table chunks, and write their new page ids, before a step (S streams).

    Args:
        table: the page table, written.
        opened: [o] slots of the requests that begin.
        first: [o * S] first live pages of each, those of a slot together.
        chunk_slot, chunk_index, chunk_id: [c] slots, which chunk of their request, and the table chunk it is in.
        column_chunk, column_offset: [n] table chunks, and the entry of each that is written for all streams.
        ids: [n * S] page ids, those of a column together.

    All tensors are int32 on the table's device; where they stand in memory does not matter.
    """
    table.first_live[opened] = first.view(-1, table.first_live.shape[1])
    table.chunk_of[chunk_slot, chunk_index] = chunk_id
    table.entries.transpose(1, 2)[column_chunk, column_offset] = ids.view(-1, table.entries.shape[1])
