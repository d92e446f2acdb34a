"""Token shift, QK-norm, rotation, forget gate and the page write in C++."""

from __future__ import annotations

from ctypes import c_double
from pathlib import Path

import torch

from ...native import NUMBERS, call, function
from ...paged import Batch, PageTable
from ...rope import angles
from ..pages import GATE_FLOOR, ForgettingPages
from . import reference


def cache_write(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    rope_base: float | None,
) -> None:
    """See :func:`.reference.cache_write`."""
    if pages.k.dtype not in NUMBERS:
        reference.cache_write(
            pages, table, batch, layer, k=k, v=v, gate=gate, shift_k=shift_k, shift_v=shift_v, k_norm=k_norm,
            norm_eps=norm_eps, rope_base=rope_base,
        )  # fmt: skip
        return
    _, heads, dim = k.shape
    cos = sin = None
    if rope_base is not None:
        angle = angles(batch.position, dim, rope_base)
        cos, sin = angle.cos(), angle.sin()
    wide = (None if x is None else x.float().contiguous() for x in (gate, shift_k, shift_v, k_norm))
    run = function("cache_write", Path(__file__).parent, pages.k.dtype, D=dim, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, layer, heads, gate.shape[2],
        k.contiguous(), v.contiguous(), *wide, norm_eps, cos, sin, c_double(GATE_FLOOR),
    )  # fmt: skip
