"""Write a step's keys, values and gates into their pages."""

from typing import Any

from ..dispatch import use_triton
from . import reference
from .reference import rotate


def cache_write(pages: Any, *args: Any) -> None:
    """:func:`.reference.cache_write`, by the implementation for the pages' device."""
    if use_triton(pages.k.device):
        from . import kernel

        kernel.cache_write(pages, *args)
    else:
        reference.cache_write(pages, *args)


__all__ = ["cache_write", "rotate"]
