"""Prefix caching with every kind of page and model: both dialects, RoPE, grouped queries, float8, no release."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import engine
from tests.support.checkpoints import PRO, make_checkpoint
from tests.support.conversations import assert_equal_without_cache, random_conversations
from tests.support.engines import assert_all_free

# Random weights give logits of some units, which are rounded by 5e-7 in float32.
TOLERANCE = 1e-5
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "shift and norm, nothing is released": ("official", PRO, {"release": False}, {}),
    "rotation": ("official", {"use_rope": True}, {}, {}),
    "grouped queries, float8 pages": ("fla", {"num_kv_heads": 2, "qkv_bias": True}, {}, {"kv_cache_dtype": "fp8"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_random_conversations(name: str, tmp_path: Path) -> None:
    dialect, fields, settings, options = MODELS[name]
    model = make_checkpoint(tmp_path / "model", dialect, **fields)
    with engine(
        model,
        {"page_size": 16, **settings},
        dtype="bfloat16" if options else "float32",
        max_model_len=512,
        max_num_batched_tokens=128,
        max_num_seqs=6,
        num_gpu_blocks_override=80,
        **options,
    ) as llm:
        traffic = random_conversations(llm, 30, random.Random(0), room=79, longest=350, vocabulary=90)
        assert traffic.hits > 10
        assert_all_free(llm)
        assert_equal_without_cache(llm, traffic.answers, 0.05 if options else TOLERANCE)
        assert_all_free(llm)
