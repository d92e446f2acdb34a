"""Forgetting attention of rows with several queries, over pages, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from ...paged import QUERY_BLOCK, Batch, PageTable
from ..pages import ForgettingPages

if TYPE_CHECKING:
    from .plan import PrefillPlan


def prefill_attention(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    threshold: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    bounded: bool,
    out: torch.Tensor,
    workspace: PrefillPlan | None,
) -> None:
    """For query i of a row and the live keys j <= i (FoX, arXiv 2503.02130),

        o_i = sum_j softmax_j(scale * q_i . k_j + c_i - c_j) v_j,

    where c is the running sum of log f. A block of queries begins at the first page that pruning has not proved
    negligible for its first query (ACP, arXiv 2504.06949), so the cost follows each (query block, head)'s live
    range.

    Args:
        pages: the page pool, in which the step's tokens are already.
        table: the page table.
        batch: the step's requests; rows with one query are left alone.
        layer: index of the layer on this worker.
        threshold: [H, G] float32, at most 0, as :func:`~..live_range.live_range` has it for all streams.
        q: [T, H, G, d] in the model's dtype: final queries (normed, rotated).
        scale: of q . k.
        bounded: whether ``scale * |q . k|`` is known to stay under :data:`..pages.PLAIN_EXP_BOUND`. Then
            exponentials need no running maximum; a fast implementation makes use of it, this one does not.
        out: [T, H, G, d] in the model's dtype, written for the tokens of rows with several queries.
        workspace: what the implementation for the device needs in one step, made by ``make_workspace``; not used
            here.
    """
    starts = [0]
    for length in batch.query_lens_host:
        starts.append(starts[-1] + length)
    for r, num_q in enumerate(batch.query_lens_host):
        if num_q > 1:
            part = slice(starts[r], starts[r + 1])
            length = int(batch.seq_lens[r])
            _row(pages, table, batch.slots[r], length, layer, threshold, q[part], scale, out[part])


def _row(
    pages: ForgettingPages,
    table: PageTable,
    slot: torch.Tensor,
    length: int,
    layer: int,
    threshold: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    size, (num_q, heads) = pages.page_size, q.shape[:2]
    streams = torch.arange(layer * heads, (layer + 1) * heads, device=q.device)
    first_live = table.first_live[slot, streams].long()
    first = int(first_live.min())
    page = torch.arange(first, -(-length // size), device=q.device)
    ids = table.page_ids(slot, page[None, :], streams[:, None])
    gates = torch.where((page >= first_live[:, None])[..., None, None], pages.gates[ids].double(), 0.0)
    # c: [H, G, tokens from `first` on]; running sum of log f, up to a constant per stream.
    total = pad(gates[:, :-1, :, -1].cumsum(1), (0, 0, 1, 0))
    c = (gates + total[..., None]).movedim(2, 1).flatten(2)[..., : length - first * size]
    last_key = torch.clamp((page + 1 - first) * size, max=c.shape[-1]) - 1

    query_pos = torch.arange(length - num_q, length, QUERY_BLOCK, device=q.device) - first * size
    # A block of queries starts where its first query, the least decayed, does.
    gap = c[:, :, query_pos, None] - c[:, :, None, last_key]
    dead = (gap < threshold[:, :, None, None]).all(1) & (last_key < query_pos[:, None])
    dead |= (page < first_live[:, None])[:, None, :]
    for h, head_starts in enumerate(dead.sum(-1).tolist()):
        lo = min(head_starts)
        k = pages.keys(ids[h, lo:]).flatten(0, 1)
        v = pages.values(ids[h, lo:]).flatten(0, 1)
        for block, start in enumerate(head_starts):
            q0 = block * QUERY_BLOCK
            q1 = min(q0 + QUERY_BLOCK, num_q)
            key0, key1 = start * size, length - num_q + q1 - first * size
            at = key0 - lo * size
            keys, values = k[at : at + key1 - key0], v[at : at + key1 - key0]
            bias = c[h, :, key1 - (q1 - q0) : key1, None] - c[h, :, None, key0:key1]
            logits = torch.matmul(q[q0:q1, h].movedim(0, 1).float(), keys.T).mul_(scale).add_(bias.float())
            causal = torch.ones(q1 - q0, q1 - q0, dtype=torch.bool, device=q.device).triu(1)
            logits[..., key1 - key0 - (q1 - q0) :].masked_fill_(causal, float("-inf"))
            out[q0:q1, h] = torch.matmul(logits.softmax(-1), values).movedim(0, 1).to(out.dtype)
