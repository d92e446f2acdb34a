"""Decode over live pages in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ..pages import ForgettingPages

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan


def decode_attention(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodePlan | None,
) -> None:
    """See :func:`.reference.decode_attention`; ``out`` is contiguous."""
    _, heads, groups, dim = q.shape
    run = function("decode_attention", __file__, pages.dtype, D=dim, PAGE=pages.page_size)
    call(run, pages.native, table.native, batch.native, layer, heads, groups, q.contiguous(), float(scale), out)
