"""New tokens into the pages of their layer, in plain PyTorch."""

from __future__ import annotations

import torch

from ..paged import Batch, PageTable
from ..subset import NEVER, SubsetPages


def subset_write(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    int_k: torch.Tensor,
) -> None:
    """Write T new tokens, each to the place of its position; they live.

    Args:
        pages, table, batch: see :mod:`kernels.subset` and :mod:`kernels.paged`; pages of the new tokens are in the
            table already.
        layer: index of the layer on this worker, which is its stream.
        k, v: [T, H, d].
        int_k: [T, r] interaction keys.
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
