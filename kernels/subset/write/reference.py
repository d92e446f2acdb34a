"""New tokens into the pages of their streams, in plain PyTorch."""

from __future__ import annotations

import torch

from ...float8 import FP8_MAX, power_of_two_above
from ...paged import Batch, PageTable
from ..pages import NEVER, Evictions, SubsetPages


def subset_write(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    int_k: torch.Tensor | None,
    evictions: Evictions | None = None,
) -> None:
    """Write T new tokens, each to the place of its position in every stream of the layer.

    No query drops them yet, unless that is decided already. The new tokens may stand where an earlier step has
    written others, which were rejected (speculative decoding): what those have decided is decided anew.

    Args:
        pages: the page pool, written.
        table: the page table, in which the new tokens' pages are already.
        batch: the step's requests.
        layer: index of the layer on this worker.
        k, v: [T, S, H, d] in the model's dtype.
        int_k: [T, S, r] interaction keys in the model's dtype; None where streams have none.
        evictions: what the new tokens decide; None if nothing is decided as tokens are written. The token that is
            decided about stands at the place of its position, as tokens do until they have left the newest page.
    """
    size, device = pages.page_size, k.device
    row, position = batch.row_of, batch.position
    streams = layer * k.shape[1] + torch.arange(k.shape[1], device=device)
    ids = table.page_ids(batch.slots[row][:, None], (position // size)[:, None], streams)
    at = ids, (position % size)[:, None]  # [T, S]
    if pages.scales is None:
        pages.k[at], pages.v[at] = k, v
    else:
        for which, (stored, new) in enumerate(((pages.k, k), (pages.v, v))):
            scale = power_of_two_above(new.float().abs().amax(-1) / FP8_MAX)
            pages.scales[(*at, slice(None), which)] = scale.to(pages.scales.dtype)
            stored.view(torch.uint8)[at] = (new.float() / scale[..., None]).to(stored.dtype).view(torch.uint8)
    if int_k is not None:
        pages.int_k[at] = int_k
    pages.begin[at] = position.int()[:, None]
    pages.end[at] = NEVER
    if evictions is None:
        return
    decided = position - evictions.lag
    token = (decided >= 0).nonzero().squeeze(-1)
    decided = decided[token, None]
    ids = table.page_ids(batch.slots[row][token, None], decided // size, streams)
    pages.end[ids, decided % size] = torch.where(
        evictions.evicts[token], decided + evictions.window + 1, NEVER
    ).int()
