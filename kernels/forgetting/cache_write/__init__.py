"""Write a step's keys, values and gates into their pages."""

from typing import TYPE_CHECKING

from ...leaf import LazyKernel, leaf
from . import cpu, reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)

cache_write = leaf(reference.cache_write, lambda: _kernel.cache_write, cpu.cache_write)

__all__ = ["cache_write"]
