"""Find the queries of a step that drop tokens for good."""

from .reference import drop_times

__all__ = ["drop_times"]
