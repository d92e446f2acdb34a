"""Attention over the live tokens of pages."""

from .reference import subset_attention

__all__ = ["subset_attention"]
