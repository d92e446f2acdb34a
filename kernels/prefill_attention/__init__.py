"""Forgetting attention of rows with several queries: whole prompts and chunks of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..dispatch import use_triton
from ..paged import PrefillWork
from . import reference

if TYPE_CHECKING:
    from .plan import PrefillPlan


def make_plan(work: PrefillWork, heads: int, groups: int) -> PrefillPlan | None:
    """A :class:`~.plan.PrefillPlan` where the implementation for the work's device needs one."""
    if not use_triton(work.tiles.device):
        return None
    from .plan import PrefillPlan

    return PrefillPlan(work, heads, groups)


def prefill_attention(pages: Any, *args: Any, plan: PrefillPlan | None) -> None:
    """:func:`.reference.prefill_attention`, by the implementation for the pages' device."""
    if plan is None:
        reference.prefill_attention(pages, *args)
    else:
        from . import kernel

        kernel.prefill_attention(*(pages, *args, plan))


__all__ = ["make_plan", "prefill_attention"]
