"""Move live tokens together, so that pages come free."""

from typing import Any

from ..dispatch import use_triton
from . import reference


def compact(pages: Any, *args: Any) -> None:
    """:func:`.reference.compact`, by the implementation for the pages' device."""
    if use_triton(pages.k.device):
        from . import kernel

        kernel.compact(pages, *args)
    else:
        reference.compact(pages, *args)


__all__ = ["compact"]
