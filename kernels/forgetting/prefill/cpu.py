"""Prefill over pages in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ..pages import ForgettingPages

if TYPE_CHECKING:
    from .plan import PrefillPlan


def prefill_attention(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    threshold: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    bounded: bool,
    out: torch.Tensor,
    workspace: PrefillPlan | None,
) -> None:
    """See :func:`.reference.prefill_attention`; ``out`` is contiguous."""
    assert batch.work is not None
    _, heads, groups, dim = q.shape
    rows, tiles = batch.work.rows.contiguous(), batch.work.tiles.contiguous()
    run = function("prefill_attention", __file__, pages.dtype, D=dim, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, rows, tiles, len(tiles), layer, heads, groups,
        threshold.contiguous(), q.contiguous(), float(scale), out,
    )  # fmt: skip
