"""Forgetting attention of rows with one query, over live pages, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...paged import Batch, PageTable
from ..pages import ForgettingPages

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan

GATHERED_NUMBERS = 1 << 19
"""So many numbers of K or V are gathered at once: they stay in a processor's cache until they are multiplied."""


def decode_attention(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodePlan | None,
) -> None:
    """For the one query i of a row and its keys j in live pages (FoX, arXiv 2503.02130),

        o_i = sum_j softmax_j(scale * q_i . k_j + D_ij) v_j,    D_ij = sum of log f over j+1..i.

    Each page gives a partial maximum, sum and value; partials of one (row, head) are then combined, so the work
    is the sum of the live lengths however much they differ.

    Args:
        pages: the page pool, in which the step's tokens are already.
        table: the page table.
        batch: the step's requests; rows with several queries are left alone.
        layer: index of the layer on this worker.
        q: [T, H, G, d] in the model's dtype: final queries (normed, rotated).
        scale: of q . k.
        out: [T, H, G, d] in the model's dtype, written for the tokens of rows with one query.
        workspace: what the implementation for the device needs from step to step, made by ``make_workspace``; not
            used here.
    """
    size, (_, heads, groups, dim), device = pages.page_size, q.shape, q.device
    streams = torch.arange(layer * heads, (layer + 1) * heads, device=device)
    rows = batch.single_rows
    token, slots = batch.query_start[rows].long(), batch.slots[rows].long()[:, None]
    last = batch.seq_lens[rows].long()[:, None] - 1
    newest = last // size
    first = torch.minimum(table.first_live[slots, streams].long(), newest)
    # The pages of all P = R * H (row, head) pairs from the newest ones back: [W, P]. The live ones make a list of n
    # pages, which begins with the newest page of every pair.
    pairs = first.numel()
    page = newest - torch.arange(int((newest - first).max()) + 1, device=device)[:, None, None]
    live = (page >= first).flatten().nonzero().squeeze(1)
    ids = table.page_ids(slots, page.clamp(min=0), streams).flatten().index_select(0, live)
    pair = live % pairs

    def by_pair(x: torch.Tensor, missing: float) -> torch.Tensor:
        """What the n live pages have, [n, ...], as [W, P, ...]."""
        full = x.new_full((len(page) * pairs, *x.shape[1:]), missing)
        return full.index_copy_(0, live, x).view(len(page), pairs, *x.shape[1:])

    offset = (last % size).expand_as(first).flatten()
    end = torch.where(live < pairs, offset.index_select(0, pair), size - 1)
    # D_ij = (sum of log f over the pages after j's) + (j's page in total) - (running sum at j).
    gates = pages.gates.index_select(0, ids)
    total = gates.gather(-1, end[:, None, None].expand(-1, groups, 1))
    totals = by_pair(total.double(), 0.0)
    after = (totals.cumsum(0) - totals).flatten(0, 1).index_select(0, live)
    logits = (total - gates).add_(after)
    query = q.index_select(0, token).flatten(0, 1).index_select(0, pair).float()
    step = max(1, GATHERED_NUMBERS // (size * dim))
    blocks = [slice(at, at + step) for at in range(0, len(ids), step)]
    for some in blocks:
        logits[some].baddbmm_(query[some], pages.keys(ids[some]).transpose(1, 2), alpha=scale)
    future = (torch.arange(size, device=device) > offset[:, None])[:, None]
    logits[:pairs].masked_fill_(future, float("-inf"))

    peak = by_pair(logits.amax(-1), float("-inf")).amax(0)
    weights = (logits - peak.index_select(0, pair)[..., None]).exp_()
    partial = torch.empty(len(ids), groups, dim, device=device)
    for some in blocks:
        values = pages.values(ids[some])
        hidden = future[some, 0, :, None]
        values[: len(hidden)].masked_fill_(hidden, 0.0)
        torch.bmm(weights[some], values, out=partial[some])
    result = by_pair(partial, 0.0).sum(0) / by_pair(weights.sum(-1), 0.0).sum(0)[..., None]
    out[token] = result.view(-1, heads, groups, dim).to(out.dtype)
