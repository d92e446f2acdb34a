"""Write a step's keys, values and gates into their pages."""

from .reference import cache_write, rotate

__all__ = ["cache_write", "rotate"]
