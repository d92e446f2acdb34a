"""New tokens into the pages of their streams, in C++."""

from __future__ import annotations

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ..pages import Evictions, SubsetPages


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
    _, streams, heads, dim = k.shape
    evicts = None if evictions is None else evictions.evicts.contiguous()
    window, lag = (0, 0) if evictions is None else (evictions.window, evictions.lag)
    run = function("subset_write", __file__, pages.dtype, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, layer, streams, heads * dim, pages.int_k.shape[2],
        k.contiguous(), v.contiguous(), None if int_k is None else int_k.contiguous(), evicts, window, lag,
    )  # fmt: skip
