"""Write a step's tokens into pages of which a subset is live."""

from typing import Any

from ..dispatch import use_triton
from . import reference


def subset_write(pages: Any, *args: Any) -> None:
    """:func:`.reference.subset_write`, by the implementation for the pages' device."""
    if use_triton(pages.k.device):
        from . import kernel

        kernel.subset_write(pages, *args)
    else:
        reference.subset_write(pages, *args)


__all__ = ["subset_write"]
