"""Attention over the live tokens of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..dispatch import use_triton
from . import reference

if TYPE_CHECKING:
    from .kernel import SeenTokens


def make_room(max_rows: int, max_model_len: int, device: torch.device) -> SeenTokens | None:
    """A :class:`~.kernel.SeenTokens` where the implementation for the device needs one."""
    if not use_triton(device):
        return None
    from .kernel import SeenTokens

    return SeenTokens(max_rows, max_model_len, device)


def subset_attention(pages: Any, *args: Any, room: SeenTokens | None) -> None:
    """:func:`.reference.subset_attention`, by the implementation for the pages' device."""
    if room is None:
        reference.subset_attention(pages, *args)
    else:
        from . import kernel

        kernel.subset_attention(*(pages, *args, room))


__all__ = ["make_room", "subset_attention"]
