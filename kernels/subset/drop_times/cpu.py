"""Which query drops which token, in C++."""

from __future__ import annotations

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ..pages import SubsetPages


def drop_times(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    int_q: torch.Tensor,
    bias: torch.Tensor,
    below: torch.Tensor | None,
) -> None:
    """See :func:`.reference.drop_times`; ``below`` is contiguous."""
    _, streams, dim = int_q.shape
    run = function("drop_times", __file__, pages.dtype, R=dim, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, layer, streams, int_q.contiguous(), bias.float(), below,
        0 if below is None else below.shape[2],
    )  # fmt: skip
