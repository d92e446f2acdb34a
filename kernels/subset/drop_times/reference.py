"""Which query drops which token, in plain PyTorch."""

from __future__ import annotations

from itertools import product

import torch

from ...paged import Batch, PageTable
from ..pages import NEVER, HeldPages, SubsetPages, picked, places, query_blocks, rows_of


def drop_times(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    int_q: torch.Tensor,
    bias: torch.Tensor,
    below: torch.Tensor | None,
) -> None:
    """The end of every token j that the step's first query still sees: the first query n > j of the step with

        q_int_n . k_int_j / sqrt(r) + bias <= 0            (DCP, arXiv 2305.15805, with its step function),

    the end that it has already, or its end in the layers below, whichever comes first.

    Args:
        pages: the page pool, in which the step's tokens are already; ``pages.end`` is written.
        table: the page table.
        batch: the step's requests.
        layer: index of the layer on this worker.
        int_q: [T, S, r] interaction queries in the model's dtype.
        bias: [S] of the scores, of any floating dtype.
        below: [R or more, S, longest request] int32: by row and position the ends that this step found in the
            layers below, replaced by those found here; the first layer does not read it. None if layers drop by
            themselves.
    """
    size, streams = pages.page_size, int_q.shape[1]
    if batch.has_decode:
        _single(pages, table, batch, layer, int_q, bias, below)
    for (row, tokens, length), nth in product(rows_of(batch, 2), range(streams)):
        at = places(pages, table, batch.slots[row], length, layer * streams + nth).flatten()
        at = at[at >= 0]
        page, offset = at // size, at % size
        live = pages.end[page, offset] > length - (tokens.stop - tokens.start)
        page, offset = page[live], offset[live]
        begin, k = pages.begin[page, offset].long(), pages.int_k[page, offset].float()
        end = pages.end[page, offset].long()
        for block, position in query_blocks(tokens, length):
            query = position.to(at.device)[:, None]
            scores = int_q[block, nth].float() @ k.T * k.shape[1] ** -0.5 + bias[nth].float()
            drops = (scores <= 0) & (begin < query)
            end = torch.minimum(end, torch.where(drops, query, NEVER).amin(0))
        if below is not None:
            if layer:
                end = torch.minimum(end, below[row, nth, begin].long())
            below[row, nth, begin] = end.int()
        pages.end[page, offset] = end.int()


def _single(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    int_q: torch.Tensor,
    bias: torch.Tensor,
    below: torch.Tensor | None,
) -> None:
    """Rows with one query, all streams at once."""
    rows, streams = batch.single_rows, torch.arange(int_q.shape[1], device=int_q.device) + layer * int_q.shape[1]
    length = batch.seq_lens[rows].long()
    held = HeldPages.of(table, pages.page_size, batch.slots[rows].long(), length, streams)
    query = (length.int() - 1)[:, None, None, None]
    before, begin = picked(pages.end, held.ids), picked(pages.begin, held.ids)
    live = held.written & (before > query)
    queries = int_q.index_select(0, batch.query_start[rows]).float() * int_q.shape[-1] ** -0.5
    k = picked(pages.int_k, held.ids).float()
    products = k.flatten(2, 3) @ queries[..., None]
    scores = products.view_as(before) + bias.float()[:, None, None]
    drops = live & (scores <= 0) & (begin < query)
    end = torch.where(drops, torch.minimum(before, query), before)
    if below is not None:
        # What is not live stands for the query itself, which nothing has dropped.
        _, count, longest = below.shape
        start = (rows[:, None] * count + torch.arange(count, device=rows.device)) * longest
        at = start[..., None, None] + torch.where(live, begin, query)
        if layer:
            end = torch.where(live, torch.minimum(end, below.take(at)), end)
        below.put_(at, torch.where(live, end, NEVER))
    pages.end.index_copy_(0, held.ids.flatten(), end.flatten(0, 2))
