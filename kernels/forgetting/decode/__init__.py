"""Forgetting attention of rows with one query over their live pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...leaf import LazyKernel, leaf, use_triton
from . import cpu, reference

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


def make_workspace(
    *,
    layers: int,
    heads: int,
    groups: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    max_rows: int,
    device: torch.device,
) -> DecodePlan | None:
    """What :func:`decode_attention` needs from step to step. Its method ``update`` is called once a step.

    Args:
        layers: attention layers of the worker.
        heads: KV heads of a layer on this worker.
        groups: query heads a KV head.
        head_dim: d.
        page_size: tokens a page.
        dtype: of K and V in pages.
        max_rows: most rows that a step can have.
        device: of the page pool.

    Returns:
        A plan where the implementation for the device needs one, else None.
    """
    if not use_triton(device):
        return None
    from ...shares.plan import DecodePlan
    from .kernel import launch

    return DecodePlan(
        launch(head_dim, groups, page_size, dtype),
        layers=layers,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        page_size=page_size,
        max_rows=max_rows,
        device=device,
    )


decode_attention = leaf(reference.decode_attention, lambda: _kernel.decode_attention, cpu.decode_attention)

__all__ = ["decode_attention", "make_workspace"]
