"""Write a step's changes into the page table."""

from typing import TYPE_CHECKING

from ..leaf import LazyKernel, leaf
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)

table_update = leaf(reference.table_update, lambda: _kernel.table_update)

__all__ = ["table_update"]
