"""Find, per request and stream, the pages that adaptive computation pruning has not proved negligible."""

from typing import TYPE_CHECKING

from ...leaf import LazyKernel, leaf
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)

live_range = leaf(reference.live_range, lambda: _kernel.live_range)
first_live_at = leaf(reference.first_live_at, lambda: _kernel.first_live_at)

__all__ = ["first_live_at", "live_range"]
