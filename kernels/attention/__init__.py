"""Forgetting attention over live pages: prefill (several queries a row) and decode (one query a row)."""

from .reference import decode_attention, prefill_attention

__all__ = ["decode_attention", "prefill_attention"]
