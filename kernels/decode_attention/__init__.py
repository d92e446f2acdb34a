"""Forgetting attention of rows with one query over their live pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..dispatch import use_triton
from . import reference

if TYPE_CHECKING:
    from .plan import DecodePlan


def make_plan(*, device: torch.device, **sizes: Any) -> DecodePlan | None:
    """A :class:`~.plan.DecodePlan` where the implementation for ``device`` needs one."""
    if not use_triton(device):
        return None
    from .plan import DecodePlan

    return DecodePlan(device=device, **sizes)


def decode_attention(pages: Any, *args: Any, plan: DecodePlan | None) -> None:
    """:func:`.reference.decode_attention`, by the implementation for the pages' device."""
    if plan is None:
        reference.decode_attention(pages, *args)
    else:
        from . import kernel

        kernel.decode_attention(*(pages, *args, plan))


__all__ = ["decode_attention", "make_plan"]
