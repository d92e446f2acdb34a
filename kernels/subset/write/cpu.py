"""New tokens into the pages of their streams, in C++."""

from __future__ import annotations

from pathlib import Path

import torch

from ...native import NUMBERS, call, function
from ...paged import Batch, PageTable
from ..pages import Evictions, SubsetPages
from . import reference


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
    """See :func:`.reference.subset_write`."""
    if pages.k.dtype not in NUMBERS:
        reference.subset_write(pages, table, batch, layer, k=k, v=v, int_k=int_k, evictions=evictions)
        return
    _, streams, heads, dim = k.shape
    evicts = None if evictions is None else evictions.evicts.contiguous()
    window, lag = (0, 0) if evictions is None else (evictions.window, evictions.lag)
    run = function("subset_write", Path(__file__).parent, pages.k.dtype, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, layer, streams, heads * dim, pages.int_k.shape[2],
        k.contiguous(), v.contiguous(), None if int_k is None else int_k.contiguous(), evicts, window, lag,
    )  # fmt: skip
