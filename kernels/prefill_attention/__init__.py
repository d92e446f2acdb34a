"""Forgetting attention of rows with several queries: whole prompts and chunks of them."""

from typing import Any

from ..dispatch import use_triton
from . import reference


def prefill_attention(pages: Any, *args: Any) -> None:
    """:func:`.reference.prefill_attention`, by the implementation for the pages' device."""
    if use_triton(pages.k.device):
        from . import kernel

        kernel.prefill_attention(pages, *args)
    else:
        reference.prefill_attention(pages, *args)


__all__ = ["prefill_attention"]
