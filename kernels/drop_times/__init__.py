"""Find the queries of a step that drop tokens for good."""

from typing import Any

from ..dispatch import use_triton
from . import reference


def drop_times(pages: Any, *args: Any) -> None:
    """:func:`.reference.drop_times`, by the implementation for the pages' device."""
    if use_triton(pages.k.device):
        from . import kernel

        kernel.drop_times(pages, *args)
    else:
        reference.drop_times(pages, *args)


__all__ = ["drop_times"]
