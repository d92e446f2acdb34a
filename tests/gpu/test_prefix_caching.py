"""Prefix caching on a CUDA GPU, with vLLM's default flags: compiled, graphs, asynchronous scheduling."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, manager
from tests.support.conversations import assert_equal_without_cache, random_conversations
from tests.support.engines import assert_all_free, compiled_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "500"))
# Logits of up to 300 are rounded by 2e-5 each in float32, and add up over four layers.
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    """So small a cache that it gives pages away all the time."""
    options = GPU_DEFAULTS | {"num_gpu_blocks_override": 100}
    with engine(fox_tiny, {"page_size": 16}, max_model_len=1024, max_num_seqs=8, **options) as started:
        before = compiled_kernels()
        yield started
        # Everything was compiled before the first request.
        assert before == compiled_kernels()


def test_random_conversations(llm: LLM) -> None:
    """Turns, resent prompts, aborts and preemptions: free pages are NaN, and nothing reads one."""
    order = random.Random(1)
    traffic = random_conversations(llm, RANDOM_REQUESTS, order, room=99, longest=600, vocabulary=250)
    cache = manager(llm).pool.prefixes
    assert cache is not None and traffic.hits > len(traffic.answers) // 3
    assert_all_free(llm)
    farthest = assert_equal_without_cache(llm, traffic.answers, TOLERANCE)
    print(f"{traffic}; log-probabilities within {farthest:.1e}; {cache.evicted_total} pages given away")
    assert_all_free(llm)
