"""The walk over page totals that finds the first live page, in plain PyTorch."""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable
from ..pages import LIVE_RANGE_PERIOD, ForgettingPages


def live_range(
    pages: ForgettingPages, table: PageTable, batch: Batch, threshold: torch.Tensor, unsettled: int
) -> None:
    """After a step's last layer: move ``table.first_live`` of its rows over the pages that have become negligible.

    With c_t the running sum of log f, the logit bias of key j for query i is ``D_ij = c_i - c_j``. It falls
    with i and rises with j, so a page is negligible for query i and all later ones as soon as its last key is:
    ``D_{i, last key} < threshold`` (ACP, arXiv 2504.06949). That D is the sum of log f over all pages between,
    plus the running sum of i's own page. The walk goes back from the newest page until every gate of the stream
    has decayed below its threshold, and reads live pages only. Rows with one query are looked at when their length
    is a multiple of ``LIVE_RANGE_PERIOD``.

    Args:
        pages: the page pool, for S streams of G gates.
        table: ``table.first_live`` is written for the batch's slots.
        batch: the step's requests, whose new tokens are in their pages.
        threshold: [S, G] float32 for all streams, at most 0; -inf prunes nothing.
        unsettled: so many of a request's newest tokens may be rejected (speculative decoding). What the request
            looks like without them is what counts: a rejected token forgets nothing.
    """
    streams = torch.arange(threshold.shape[0], device=threshold.device)
    due = (batch.query_start.diff() > 1) | (batch.seq_lens % LIVE_RANGE_PERIOD == 0)
    if not due.any():
        return
    slots, seq_lens = batch.slots[due].long()[:, None], batch.seq_lens[due].long()
    first = table.first_live[slots, streams]
    settled = (seq_lens - unsettled).clamp(min=1)
    # A request may have had more settled tokens before, when it had more new ones.
    found = _walk_back(pages, table, slots, settled, first, threshold)
    table.first_live[slots, streams] = torch.maximum(first, found)


def first_live_at(
    pages: ForgettingPages,
    table: PageTable,
    threshold: torch.Tensor,
    *,
    slots: torch.Tensor,
    num_pages: torch.Tensor,
    before: torch.Tensor,
) -> torch.Tensor:
    """Find the first live pages as they were when each of B requests had filled ``num_pages`` pages.

    It is the formula of :func:`live_range`, for a query that is the last token of page ``num_pages - 1``.

    Args:
        pages, table, threshold: as there; ``table.first_live`` is not used.
        slots: [B] int32 slots of the requests.
        num_pages: [B] int32 full pages, at least 1.
        before: [B, S] int32 first pages that may be read.

    Returns:
        [B, S] int32 first live pages.
    """
    return _walk_back(pages, table, slots.long()[:, None], num_pages.long() * pages.page_size, before, threshold)


def _walk_back(
    pages: ForgettingPages,
    table: PageTable,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    first: torch.Tensor,
    threshold: torch.Tensor,
) -> torch.Tensor:
    """First live pages [R, S] for sequences' last queries: slots [R, 1], lengths [R], first page to read [R, S]."""
    size, streams = pages.page_size, torch.arange(threshold.shape[0], device=threshold.device)
    newest = (seq_lens - 1) // size
    # Padding rows all share slot 0, so what it remembers may lie beyond the row at hand.
    first = torch.minimum(first.long(), newest[:, None])
    back = torch.arange(int((newest[:, None] - first).max()) + 1, device=first.device)
    page = newest[:, None, None] - back
    readable = page >= first[:, :, None]
    ids = table.page_ids(slots[:, :, None], page.clamp(min=0), streams[:, None])
    # Entry w: what page (newest - w) adds. The newest page counts up to the last query only.
    offset = torch.where(back == 0, (seq_lens - 1)[:, None, None] % size, size - 1)
    added = pages.gates[ids, :, offset].double()
    added = torch.where(readable[..., None], added, 0.0)
    decay = added.cumsum(2) - added
    live = readable & ((decay >= threshold[None, :, None, :]).any(-1) | (back == 0))
    return (newest[:, None] + 1 - live.sum(-1)).to(table.first_live.dtype)
