"""Attention over the live tokens of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...leaf import LazyKernel, leaf, use_triton
from . import reference
from .workspace import SeenTokens

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


def make_workspace(max_rows: int, streams: int, max_model_len: int, device: torch.device) -> SeenTokens | None:
    """What :func:`subset_attention` needs from step to step.

    Args:
        max_rows: most rows that a step can have.
        streams: S, of a layer.
        max_model_len: longest request.
        device: of the pages.

    Returns:
        Room for lists of tokens where the implementation for the device needs it, else None.
    """
    return SeenTokens(max_rows, streams, max_model_len, device) if use_triton(device) else None


subset_attention = leaf(reference.subset_attention, lambda: _kernel.subset_attention)

__all__ = ["make_workspace", "subset_attention"]
