"""Move live tokens together, so that pages come free."""

from .reference import compact

__all__ = ["compact"]
