"""Forgetting attention over pages in plain PyTorch: a leaf for prefill rows and one for decode rows.

Both compute, for query i and the live keys j <= i (FoX, arXiv 2503.02130),

    o_i = sum_j softmax_j(scale * q_i . k_j + c_i - c_j) v_j,

where pages that the pruning threshold has proved negligible for a query are left out (ACP, arXiv 2504.06949).
"""

from __future__ import annotations

import torch

from ..live_range import LiveRange
from ..paged import Batch, Pages, PageTable

QUERY_BLOCK = 128
"""Queries that share one start of the live range in prefill."""

DECODE_ELEMENTS = 1 << 26
"""Upper bound on the elements of K gathered at once in decode."""


def prefill_attention(
    pages: Pages,
    table: PageTable,
    batch: Batch,
    streams: torch.Tensor,
    live: LiveRange,
    threshold: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    rows: list[int],
    out: torch.Tensor,
) -> None:
    """Attention of the rows with any number of queries; cost follows each (query block, head)'s live range.

    Args:
        q: [T, H, G, d], final queries (normed, rotated).
        threshold: [H, G] as for :func:`live_range`.
        rows: rows of the batch to compute.
        out: [T, H, G, d], written for the tokens of ``rows``.
    """
    size, dim = pages.page_size, q.shape[-1]
    starts = [0]
    for length in batch.query_lens_host:
        starts.append(starts[-1] + length)
    for r in rows:
        num_q, length = batch.query_lens_host[r], batch.seq_lens_host[r]
        num_pages = -(-length // size)
        before = live.before[r]
        first = int(before.min())
        page = torch.arange(first, num_pages, device=q.device)
        ids = table.page_ids(batch.slots[r], page[None, :], streams[:, None])
        gates = torch.where((page >= before[:, None])[..., None, None], pages.gates[ids].double(), 0.0)
        # c: [H, G, tokens from `first` on]; running sum of log f, up to a constant per stream.
        total = torch.nn.functional.pad(gates[:, :-1, :, -1].cumsum(1), (0, 0, 1, 0))
        c = (gates + total[..., None]).movedim(2, 1).flatten(2)[..., : length - first * size]
        last_key = torch.clamp((page + 1 - first) * size, max=c.shape[-1]) - 1

        query_pos = torch.arange(length - num_q, length, QUERY_BLOCK, device=q.device) - first * size
        # A block of queries starts where its first query, the least decayed, does.
        gap = c[:, :, query_pos, None] - c[:, :, None, last_key]
        dead = (gap < threshold[:, :, None, None]).all(1) & (last_key < query_pos[:, None])
        dead |= (page < before[:, None])[:, None, :]
        block_start = dead.sum(-1).tolist()

        for h, head_starts in enumerate(block_start):
            lo = min(head_starts)
            k = pages.k[ids[h, lo:]].reshape(-1, dim).float()
            v = pages.v[ids[h, lo:]].reshape(-1, dim).float()
            for block, start in enumerate(head_starts):
                q0 = block * QUERY_BLOCK
                q1 = min(q0 + QUERY_BLOCK, num_q)
                key0, key1 = start * size, length - num_q + q1 - first * size
                at = key0 - lo * size
                keys, values = k[at : at + key1 - key0], v[at : at + key1 - key0]
                queries = q[starts[r] + q0 : starts[r] + q1, h].movedim(0, 1).float()
                bias = c[h, :, key1 - (q1 - q0) : key1, None] - c[h, :, None, key0:key1]
                logits = torch.matmul(queries, keys.T).mul_(scale).add_(bias.float())
                causal = torch.ones(q1 - q0, q1 - q0, dtype=torch.bool, device=q.device).triu(1)
                logits[..., key1 - key0 - (q1 - q0) :].masked_fill_(causal, float("-inf"))
                result = torch.matmul(logits.softmax(-1), values)
                out[starts[r] + q0 : starts[r] + q1, h] = result.movedim(0, 1).to(out.dtype)


def decode_attention(
    pages: Pages,
    table: PageTable,
    batch: Batch,
    streams: torch.Tensor,
    live: LiveRange,
    q: torch.Tensor,
    scale: float,
    rows: list[int],
    out: torch.Tensor,
) -> None:
    """Attention of rows with one query each: one gather of all live pages of all rows and heads.

    Each page gives a partial maximum, sum and value; partials of one (row, head) are then combined, so the work
    is the sum of the live lengths however much they differ.

    Args:
        q: [T, H, G, d], final queries.
        rows: rows of the batch to compute; each has exactly one query.
        out: [T, H, G, d], written for the tokens of ``rows``.
    """
    size, dim = pages.page_size, q.shape[-1]
    most_pages = max(-(-batch.seq_lens_host[r] // size) for r in rows)
    step = max(1, DECODE_ELEMENTS // (most_pages * size * dim * len(streams)))
    for at in range(0, len(rows), step):
        some = torch.tensor(rows[at : at + step], device=q.device)
        _decode_rows(pages, table, batch, streams, live, q, scale, some, out)


def _decode_rows(
    pages: Pages,
    table: PageTable,
    batch: Batch,
    streams: torch.Tensor,
    live: LiveRange,
    q: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    out: torch.Tensor,
) -> None:
    size = pages.page_size
    heads, groups = q.shape[1], q.shape[2]
    newest = (batch.seq_lens[rows] - 1) // size
    counts = (newest[:, None] + 1 - live.after[rows]).flatten()
    segment = torch.repeat_interleave(torch.arange(counts.numel(), device=q.device), counts)
    row, head = segment // heads, segment % heads
    back = torch.arange(segment.numel(), device=q.device) - (counts.cumsum(0) - counts)[segment]
    ids = table.page_ids(batch.slots[rows][row], newest[row] - back, streams[head])

    token = batch.query_start[rows]
    gates = pages.gates[ids].double()
    offset = (batch.seq_lens[rows] - 1)[row] % size
    # D_ij = (D from the query to the page's last key) + (running sum there) - (running sum at j).
    end = torch.where(back == 0, offset, size - 1)
    at_end = gates.gather(-1, end[:, None, None].expand(-1, groups, 1))
    bias = live.decay[rows][row, head, :, back][..., None] + (at_end - gates)
    queries = q[token][row, head].float()
    logits = torch.einsum("pgd,pnd->pgn", queries, pages.k[ids].float()) * scale + bias.float()
    future = torch.arange(size, device=q.device) > end[:, None]
    logits = logits.masked_fill(future[:, None, :], float("-inf"))

    shape = (counts.numel(), groups)
    index = segment[:, None].expand(-1, groups)
    peak = torch.full(shape, float("-inf"), device=q.device).scatter_reduce(0, index, logits.amax(-1), "amax")
    weights = (logits - peak[segment][..., None]).exp()
    mass = torch.zeros(shape, device=q.device).index_add_(0, segment, weights.sum(-1))
    values = torch.where(future[..., None], 0.0, pages.v[ids].float())
    partial = torch.einsum("pgn,pnd->pgd", weights, values)
    result = torch.zeros(*shape, q.shape[-1], device=q.device).index_add_(0, segment, partial)
    out[token] = (result / mass[..., None]).view(-1, heads, groups, q.shape[-1]).to(out.dtype)
