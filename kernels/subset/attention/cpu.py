"""Attention over the tokens that a stream has not dropped, in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ..pages import SubsetPages
from .workspace import SeenTokens

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan


def subset_attention(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodePlan | SeenTokens | None,
) -> None:
    """See :func:`.reference.subset_attention`; ``out`` is contiguous."""
    sizes = {"D": q.shape[4], "PAGE": pages.page_size}
    held = pages.native, table.native, batch.native
    rest = layer, *q.shape[1:4], q.contiguous(), float(scale), out
    if batch.has_decode:
        call(function("decode_attention", __file__, pages.dtype, **sizes), *held, *rest)
    if batch.work is not None:
        rows, tiles = batch.work.rows.contiguous(), batch.work.tiles.contiguous()
        call(function("prefill_attention", __file__, pages.dtype, **sizes), *held, rows, tiles, len(tiles), *rest)
