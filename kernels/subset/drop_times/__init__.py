"""Find the queries of a step that drop tokens for good."""

from typing import TYPE_CHECKING

from ...leaf import LazyKernel, leaf
from . import cpu, reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)

drop_times = leaf(reference.drop_times, lambda: _kernel.drop_times, cpu.drop_times)

__all__ = ["drop_times"]
