"""Write a step's tokens into pages of which a subset is live."""

from typing import TYPE_CHECKING

from ...leaf import LazyKernel, leaf
from . import cpu, reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)

subset_write = leaf(reference.subset_write, lambda: _kernel.subset_write, cpu.subset_write)

__all__ = ["subset_write"]
