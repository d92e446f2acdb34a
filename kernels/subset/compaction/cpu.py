"""Live tokens of the oldest pages into the places of dropped ones, in C++."""

from __future__ import annotations

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ..pages import SubsetPages


def compact(pages: SubsetPages, table: PageTable, batch: Batch, period: int = 1, unsettled: int = 0) -> None:
    """See :func:`.reference.compact`."""
    stored = [pages.k, pages.v, pages.int_k, pages.begin, pages.end]
    pool = torch.empty(0, dtype=torch.uint8).set_(pages.k.untyped_storage())
    # Tokens move as bytes, whatever their format is.
    fields = [[x.storage_offset() * x.element_size(), x[0, 0].numel() * x.element_size()] for x in stored]
    run = function("compact", __file__, pages.dtype, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, pool, pages.k.stride(0) * pages.k.element_size(),
        torch.tensor(fields), len(fields), period, unsettled,
    )  # fmt: skip
