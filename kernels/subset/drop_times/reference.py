"""Which query drops which token, in plain PyTorch."""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable
from ..pages import NEVER, SubsetPages, places, query_blocks, rows_of


def drop_times(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    int_q: torch.Tensor,
    bias: torch.Tensor,
    below: torch.Tensor | None,
) -> None:
    """The end of every live token j: the first query n > j of the step with

        q_int_n . k_int_j / sqrt(r) + bias <= 0            (DCP, arXiv 2305.15805, with its step function),

    or the token's end in the layers below, whichever comes first.

    Args:
        pages: the page pool, in which the step's tokens are already; ``pages.end`` is written.
        table: the page table.
        batch: the step's requests.
        layer: index of the layer on this worker.
        int_q: [T, r] interaction queries in the model's dtype.
        bias: [1] of the scores, of any floating dtype.
        below: [R or more, longest request] int32: by row and position the ends that this step found in the layers
            below, replaced by those found here; the first layer does not read it. None if layers drop by
            themselves.
    """
    size = pages.page_size
    for row, tokens, length in rows_of(batch):
        at = places(pages, table, batch.slots[row], length, layer).flatten()
        at = at[at >= 0]
        page, offset = at // size, at % size
        live = pages.end[page, offset] == NEVER
        page, offset = page[live], offset[live]
        begin, k = pages.begin[page, offset].long(), pages.int_k[page, offset].float()
        end = torch.full_like(begin, NEVER)
        for block, position in query_blocks(tokens, length):
            query = position.to(at.device)[:, None]
            scores = int_q[block].float() @ k.T * k.shape[1] ** -0.5 + bias.float()
            drops = (scores <= 0) & (begin < query)
            end = torch.minimum(end, torch.where(drops, query, NEVER).amin(0))
        if below is not None:
            if layer:
                end = torch.minimum(end, below[row, begin].long())
            below[row, begin] = end.int()
        pages.end[page, offset] = end.int()
