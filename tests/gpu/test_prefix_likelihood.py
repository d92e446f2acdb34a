"""Prefix caching over a checkpoint of the official training code, on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.engines import (
    GPU_DEFAULTS,
    engine,
    generate,
    manager,
    num_blocks,
    run_to_the_end,
    run_until_decoding,
    usage,
)
from tests.support.conversations import answer_of, assert_equal_without_cache, params
from tests.support.engines import assert_all_free

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
# Logits of up to 300 are rounded by 2e-5 each in float32, and add up over the layers.
TOLERANCE = 2e-3


def test_trained_model_goes_on_from_real_text(fox_18m: Path) -> None:
    """Likelihoods of what follows, and the live share, are those without the cache."""
    tokens = load_file(fox_18m / "reference.safetensors")["input_ids"].tolist()
    with engine(fox_18m, dtype="float32", max_model_len=16384, **GPU_DEFAULTS) as llm:
        (first,) = generate(llm, [tokens], params(100))
        text = tokens + answer_of(first).tokens + tokens[:200]
        live = {}
        for cached in (True, False):
            llm.llm_engine.add_request(
                "next", {"prompt_token_ids": text}, params(80, skip_reading_prefix_cache=not cached)
            )
            run_until_decoding(llm, tokens=70)
            live[cached] = usage(llm) * num_blocks(llm) / (len(text) / manager(llm).block_size)
            run_to_the_end(llm)
            assert_all_free(llm)
        (out,) = generate(llm, [text], params(64))
        assert out.num_cached_tokens >= len(tokens) + 64
        farthest = assert_equal_without_cache(llm, [answer_of(out)], TOLERANCE)
        print(
            f"{out.num_cached_tokens} of {len(text)} tokens cached; log-probabilities within {farthest:.1e}; {live}"
        )
        assert live[True] == pytest.approx(live[False], rel=0.02)
