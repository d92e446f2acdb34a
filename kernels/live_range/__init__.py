"""Find, per request and stream, the pages that adaptive computation pruning has not proved negligible."""

from .reference import LiveRange, live_range

__all__ = ["LiveRange", "live_range"]
