"""Decode over live pages in C++."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...native import NUMBERS, call, function
from ...paged import Batch, PageTable
from ..pages import ForgettingPages
from . import reference

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
    if pages.k.dtype not in NUMBERS:
        reference.decode_attention(pages, table, batch, layer, q, scale, out, workspace)
        return
    _, heads, groups, dim = q.shape
    run = function("decode_attention", Path(__file__).parent, pages.k.dtype, D=dim, PAGE=pages.page_size)
    call(run, pages.native, table.native, batch.native, layer, heads, groups, q.contiguous(), scale, out)
