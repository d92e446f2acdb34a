"""Token shift, QK-norm, rotation, forget gate and the page write in C++."""

from __future__ import annotations

from ctypes import c_double

import torch

from ...native import call, function
from ...paged import Batch, PageTable
from ...rope import angles
from ..pages import GATE_FLOOR, ForgettingPages


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
    _, heads, dim = k.shape
    cos = sin = None
    if rope_base is not None:
        angle = angles(batch.position, dim, rope_base)
        cos, sin = angle.cos(), angle.sin()
    wide = (None if x is None else x.float().contiguous() for x in (gate, shift_k, shift_v, k_norm))
    run = function("cache_write", __file__, pages.dtype, D=dim, PAGE=pages.page_size)
    call(
        run, pages.native, table.native, batch.native, layer, heads, gate.shape[2],
        k.contiguous(), v.contiguous(), *wide, float(norm_eps), cos, sin, c_double(GATE_FLOOR),
    )  # fmt: skip
