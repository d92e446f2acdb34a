"""Copy pages from one pool to another."""

from typing import TYPE_CHECKING

from ..leaf import LazyKernel, leaf
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)

page_copy = leaf(reference.page_copy, lambda: _kernel.page_copy)

__all__ = ["page_copy"]
