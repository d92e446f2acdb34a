"""Find, per request and stream, the pages that adaptive computation pruning has not proved negligible."""

from typing import Any

from ..dispatch import use_triton
from . import reference


def live_range(pages: Any, *args: Any) -> None:
    """:func:`.reference.live_range`, by the implementation for the pages' device."""
    if use_triton(pages.k.device):
        from . import kernel

        kernel.live_range(pages, *args)
    else:
        reference.live_range(pages, *args)


__all__ = ["live_range"]
