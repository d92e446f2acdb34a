"""New tokens into the pages of their layer, in plain PyTorch."""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable
from ..pages import NEVER, SubsetPages


def subset_write(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    int_k: torch.Tensor,
) -> None:
    """Write T new tokens, each to the place of its position; they live.

    Args:
        pages: the page pool, written.
        table: the page table, in which the new tokens' pages are already.
        batch: the step's requests.
        layer: index of the layer on this worker, which is its stream.
        k, v: [T, H, d] in the model's dtype.
        int_k: [T, r] interaction keys in the model's dtype.
    """
    size, device = pages.page_size, k.device
    query_start, seq_lens = batch.query_start.long(), batch.seq_lens.long()
    lens = query_start.diff()
    row = torch.repeat_interleave(torch.arange(batch.num_rows, device=device), lens)
    position = (seq_lens - lens)[row] + torch.arange(batch.num_tokens, device=device) - query_start[row]
    ids = table.page_ids(batch.slots[row], position // size, torch.tensor(layer, device=device))
    at = ids, position % size
    pages.k[at], pages.v[at], pages.int_k[at] = k, v, int_k
    pages.begin[at] = position.int()
    pages.end[at] = NEVER
