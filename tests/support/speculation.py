"""Speculative decoding in tests: the option, and vLLM's own counts of drafts."""

from __future__ import annotations

from typing import Any

from vllm import LLM

SPECULATION: dict[str, Any] = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
"""A single token that was there before is followed by drafts, so there are many of them, right and wrong."""


def drafted(llm: LLM) -> tuple[int, int]:
    """Drafts that an engine's steps have tried, and how many of these were accepted."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
    proposed, accepted = (int(counts.get(name, 0)) for name in names)
    return proposed, accepted
