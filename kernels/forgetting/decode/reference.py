"""Forgetting attention of rows with one query, over live pages, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...paged import Batch, PageTable
from ...segments import sums_since
from ..pages import ForgettingPages

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan

MAX_GATHERED_ELEMENTS = 1 << 26
"""At most so many elements of K are gathered at once."""


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
    size, (_, heads, _, dim) = pages.page_size, q.shape
    rows = torch.tensor([r for r, n in enumerate(batch.query_lens_host) if n == 1], device=q.device)
    most_pages = -(-int(batch.seq_lens[rows].max()) // size)
    step = max(1, MAX_GATHERED_ELEMENTS // (most_pages * size * dim * heads))
    for some in rows.split(step):
        _rows(pages, table, batch, layer, q, scale, some, out)


def _rows(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    size, (_, heads, groups, dim), device = pages.page_size, q.shape, q.device
    streams = torch.arange(layer * heads, (layer + 1) * heads, device=device)
    slots, last = batch.slots[rows].long(), batch.seq_lens[rows].long() - 1
    newest = last // size
    counts = newest[:, None] + 1 - torch.minimum(table.first_live[slots[:, None], streams].long(), newest[:, None])
    # One entry a live page: [row 0 head 0 newest..oldest, row 0 head 1 newest..oldest, ...].
    counts = counts.flatten()
    segment = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts)
    row, head = segment // heads, segment % heads
    first = (counts.cumsum(0) - counts)[segment]
    back = torch.arange(segment.numel(), device=device) - first
    ids = table.page_ids(slots[row], newest[row] - back, streams[head])

    gates = pages.gates[ids].double()
    end = torch.where(back == 0, last[row] % size, size - 1)
    total = gates.gather(-1, end[:, None, None].expand(-1, groups, 1))
    # D_ij = (sum of log f over the pages after j's) + (j's page in total) - (running sum at j).
    bias = sums_since(total, first)[1:] - gates
    token = batch.query_start[rows].long()
    logits = torch.einsum("pgd,pnd->pgn", q[token][row, head].float(), pages.keys(ids)) * scale + bias.float()
    future = torch.arange(size, device=device) > end[:, None]
    logits = logits.masked_fill(future[:, None, :], float("-inf"))

    shape = (counts.numel(), groups)
    index = segment[:, None].expand(-1, groups)
    peak = torch.full(shape, float("-inf"), device=device).scatter_reduce(0, index, logits.amax(-1), "amax")
    weights = (logits - peak[segment][..., None]).exp()
    mass = torch.zeros(shape, device=device).index_add_(0, segment, weights.sum(-1))
    values = torch.where(future[..., None], 0.0, pages.values(ids))
    partial = torch.einsum("pgn,pnd->pgd", weights, values)
    result = torch.zeros(*shape, dim, device=device).index_add_(0, segment, partial)
    out[token] = (result / mass[..., None]).view(-1, heads, groups, dim).to(out.dtype)
