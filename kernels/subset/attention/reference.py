"""Attention over the tokens that a stream has not dropped, in plain PyTorch."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from ...paged import Batch, PageTable
from ..pages import SubsetPages, places, query_blocks, rows_of
from .workspace import SeenTokens

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan


def subset_attention(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodePlan | SeenTokens | None,
) -> None:
    """``o_i = sum_j softmax_j(scale * q_i . k_j) v_j`` over the tokens j with ``begin_j <= i < end_j``.

    Args:
        pages: the page pool; the step's tokens have been written and their ends found.
        table: the page table.
        batch: the step's requests.
        layer: index of the layer on this worker.
        q: [T, S, H, G, d] in the model's dtype.
        scale: of the logits.
        out: [T, S, H, G, d] in the model's dtype, written.
        workspace: what the implementation for the device needs from step to step, made by ``make_workspace``; not
            used here.
    """
    size, streams = pages.page_size, q.shape[1]
    for (row, tokens, length), nth in product(rows_of(batch), range(streams)):
        at = places(pages, table, batch.slots[row], length, layer * streams + nth).flatten()
        at = at[at >= 0]
        page, offset = at // size, at % size
        begin, end = pages.begin[page, offset], pages.end[page, offset]
        for block, position in query_blocks(tokens, length):
            query = position.to(at.device)[:, None]
            visible = (begin <= query) & (query < end)
            seen = visible.any(0).nonzero().squeeze(1)
            k, v = pages.keys(page[seen], offset[seen]), pages.values(page[seen], offset[seen])
            logits = torch.einsum("ihgd,jhd->hgij", q[block, nth].float(), k) * scale
            weights = logits.masked_fill(~visible[:, seen], float("-inf")).softmax(-1)
            out[block, nth] = torch.einsum("hgij,jhd->ihgd", weights, v).to(out.dtype)
