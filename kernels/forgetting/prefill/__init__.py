"""Forgetting attention of rows with several queries: whole prompts and chunks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...leaf import LazyKernel, leaf, use_triton
from ...paged import PrefillWork
from . import cpu, reference

if TYPE_CHECKING:
    from . import kernel as _kernel
    from .plan import PrefillPlan
else:
    _kernel = LazyKernel(__name__)


def make_workspace(work: PrefillWork, heads: int, groups: int) -> PrefillPlan | None:
    """What :func:`prefill_attention` needs in one step, from layer to layer.

    Args:
        work: the step's.
        heads: KV heads of a layer on this worker.
        groups: query heads a KV head.

    Returns:
        A plan where the implementation for the work's device needs one, else None.
    """
    if not use_triton(work.tiles.device):
        return None
    from .plan import PrefillPlan

    return PrefillPlan(work, heads, groups)


prefill_attention = leaf(reference.prefill_attention, lambda: _kernel.prefill_attention, cpu.prefill_attention)

__all__ = ["make_workspace", "prefill_attention"]
