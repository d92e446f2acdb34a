"""Attention over the live tokens of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...leaf import LazyKernel, leaf, use_triton
from ..pages import SubsetPages
from . import cpu, reference
from .workspace import SeenTokens

if TYPE_CHECKING:
    from ...shares.plan import DecodePlan
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


def make_workspace(
    pages: SubsetPages, *, layers: int, streams: int, groups: int, max_rows: int, max_model_len: int
) -> DecodePlan | SeenTokens | None:
    """What :func:`subset_attention` needs from step to step. Its method ``update`` is called once a step.

    Args:
        pages: the page pool.
        layers: attention layers of the worker.
        streams: S, of a layer.
        groups: query heads a KV head.
        max_rows: most rows that a step can have.
        max_model_len: longest request.

    Returns:
        Where the implementation for the device needs something: a plan for streams of one KV head, and room for the
        lists of rows with one query for others. Else None.
    """
    heads, dim = pages.k.shape[2:]
    if not use_triton(pages.device):
        return None
    if heads > 1:
        return SeenTokens(max_rows, streams, max_model_len, pages.device)
    from ...shares.plan import DecodePlan
    from .decode_kernel import launch

    return DecodePlan(
        launch(dim, pages.page_size, pages.dtype),
        layers=layers,
        heads=streams,
        groups=groups,
        head_dim=dim,
        page_size=pages.page_size,
        max_rows=max_rows,
        device=pages.device,
    )


subset_attention = leaf(reference.subset_attention, lambda: _kernel.subset_attention, cpu.subset_attention)

__all__ = ["make_workspace", "subset_attention"]
