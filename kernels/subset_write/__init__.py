"""Write a step's tokens into pages of which a subset is live."""

from .reference import subset_write

__all__ = ["subset_write"]
