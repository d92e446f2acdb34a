"""The walk over page totals that finds the first live page, in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..paged import Batch, Pages, PageTable


@dataclass(frozen=True)
class LiveRange:
    """What a step may read (R rows, H streams of the layer, G gates, W pages walked).

    Attributes:
        before: [R, H] int64: first live page before this step. Every query of the step reads from here on.
        after: [R, H] int64: first page that the step's last query still needs; for later queries all pages
            before it are dead, too.
        decay: [R, H, G, W] float32: entry w is D from the last query to the last key of page
            ``pages - 1 - w`` (0 for w = 0, the newest page).
    """

    before: torch.Tensor
    after: torch.Tensor
    decay: torch.Tensor


def live_range(
    pages: Pages, table: PageTable, batch: Batch, streams: torch.Tensor, threshold: torch.Tensor
) -> LiveRange:
    """Walk back from the newest page until every gate of the stream has decayed below its threshold.

    With c_t the running sum of log f, the logit bias of key j for query i is ``D_ij = c_i - c_j``. It falls
    with i and rises with j, so a page is negligible for query i and all later ones as soon as its last key is:
    ``D_{i, last key} < threshold`` (ACP, arXiv 2504.06949). That D is the sum of log f over all pages between,
    plus the running sum of i's own page. The walk reads live pages only, and moves ``table.first_live`` forward.

    Args:
        threshold: [H, G] float32, at most 0; -inf prunes nothing.
    """
    size = pages.page_size
    slots = batch.slots[:, None]
    newest = (batch.seq_lens - 1) // size
    # Padding rows all share slot 0, so what it remembers may lie beyond the row at hand.
    before = torch.minimum(table.first_live[slots, streams].long(), newest[:, None])
    width = int((newest[:, None] - before).max()) + 1
    back = torch.arange(width, device=before.device)
    page = newest[:, None, None] - back
    readable = page >= before[:, :, None]
    ids = table.page_ids(slots[:, :, None], page.clamp(min=0), streams[:, None])
    # Entry w: what page (newest - w) adds. The newest page counts up to the last query only.
    offset = torch.where(back == 0, (batch.seq_lens - 1)[:, None, None] % size, size - 1)
    added = pages.gates[ids, :, offset].double().movedim(-1, 2)
    added = torch.where(readable[:, :, None, :], added, 0.0)
    decay = torch.nn.functional.pad(added.cumsum(-1)[..., :-1], (1, 0)).float()
    live = readable & ((decay >= threshold[None, :, :, None]).any(2) | (back == 0))
    after = newest[:, None] + 1 - live.sum(-1)
    table.first_live[slots, streams] = after.to(table.first_live.dtype)
    return LiveRange(before, after, decay)
