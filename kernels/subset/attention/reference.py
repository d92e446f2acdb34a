"""Attention over the tokens that a stream has not dropped, in plain PyTorch."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from ...paged import Batch, PageTable
from ..pages import HeldPages, SubsetPages, picked, places, query_blocks, rows_of
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
    if batch.has_decode:
        _single(pages, table, batch, layer, q, scale, out)
    for (row, tokens, length), nth in product(rows_of(batch, 2), range(streams)):
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


def _single(
    pages: SubsetPages, table: PageTable, batch: Batch, layer: int, q: torch.Tensor, scale: float, out: torch.Tensor
) -> None:
    """Rows with one query, all streams at once."""
    rows, streams = batch.single_rows, torch.arange(q.shape[1], device=q.device) + layer * q.shape[1]
    token, length = batch.query_start[rows].long(), batch.seq_lens[rows].long()
    held = HeldPages.of(table, pages.page_size, batch.slots[rows].long(), length, streams)
    seen = picked(pages.end, held.ids) >= length[:, None, None, None]
    seen &= held.written
    k, v = pages.keys(held.ids), pages.values(held.ids)
    # Other places may hold anything. They are few where requests hold about as many pages.
    others = seen.flatten().logical_not().nonzero().squeeze(1)
    for x in (k, v):
        x.flatten(0, 3).index_fill_(0, others, 0.0)
    # [R * S, H, G or W * N, d]
    k, v = (x.flatten(0, 1).flatten(1, 2).transpose(1, 2) for x in (k, v))
    mask = seen.flatten(2).flatten(0, 1)[:, None, None]
    result = scaled_dot_product_attention(
        q.index_select(0, token).flatten(0, 1).float(), k, v, attn_mask=mask, scale=scale
    )
    out[token] = result.view(-1, *q.shape[1:]).to(out.dtype)
