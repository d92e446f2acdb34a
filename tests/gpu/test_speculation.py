"""Speculative decoding by n-gram on a CUDA GPU, with vLLM's default flags: synchronous, and scheduled ahead."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, generate, greedy, manager, source_tokens
from tests.support import ROOT
from tests.support.conversations import assert_equal_without_cache, random_conversations
from tests.support.engines import assert_all_free, compiled_kernels, random_traffic
from tests.support.speculation import SPECULATION, drafted

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "200"))
# Logits of up to 300 are rounded by 2e-5 each in float32, and add up over four layers.
TOLERANCE = 2e-3
OPTIONS = GPU_DEFAULTS | {"max_model_len": 1024, "max_num_seqs": 8, "num_gpu_blocks_override": 100}
REQUESTS = 24


def requests_of(llm: LLM) -> dict[str, tuple[list[int], int]]:
    """Files of Python source that begin again at their end, and the tokens of their answers."""
    order = random.Random(0)
    files = {str(n): source_tokens(llm, order.randint(20, 500), seed=n) for n in range(REQUESTS)}
    return {name: (file + file[: order.randint(1, 40)], order.randint(40, 150)) for name, file in files.items()}


def solo(llm: LLM, requests: dict[str, tuple[list[int], int]]) -> dict[str, list[int]]:
    """Greedy answers, one request at a time."""
    return {
        name: list(generate(llm, [prompt], greedy(count))[0].outputs[0].token_ids)
        for name, (prompt, count) in requests.items()
    }


@pytest.fixture(scope="module", params=["fox-tiny", "llama-evict-tiny"])
def without(request: pytest.FixtureRequest) -> tuple[Path, dict[str, list[int]]]:
    """A model, and its answers in an engine without drafts."""
    model = ROOT / "examples" / request.param
    with engine(model, {"page_size": 16}, **OPTIONS) as llm:
        return model, solo(llm, requests_of(llm))


@pytest.fixture(scope="module", params=["ngram", "ngram_gpu"])
def llm(request: pytest.FixtureRequest, without: tuple[Path, dict[str, list[int]]]) -> Iterator[LLM]:
    with engine(
        without[0], {"page_size": 16}, speculative_config=SPECULATION | {"method": request.param}, **OPTIONS
    ) as started:
        config = started.llm_engine.vllm_config
        assert config.use_v2_model_runner
        assert config.scheduler_config.async_scheduling == (request.param == "ngram_gpu")
        # A step of several queries a request is never captured whole.
        assert config.compilation_config.cudagraph_mode.name == "PIECEWISE"
        before = compiled_kernels()
        yield started
        # Everything was compiled before the first request.
        assert before == compiled_kernels()


def test_greedy_text_is_that_without_drafts(llm: LLM, without: tuple[Path, dict[str, list[int]]]) -> None:
    """Alone, and among others with aborts and preemptions; in float32, where ties are rare."""
    requests, before = requests_of(llm), drafted(llm)
    assert solo(llm, requests) == without[1]
    proposed, accepted = (now - then for now, then in zip(drafted(llm), before))
    assert 100 < accepted < proposed - 100, (proposed, accepted)
    assert manager(llm).pool.released_total > 0
    assert_all_free(llm)
    finished, aborted, preempted = random_traffic(llm, requests, random.Random(1), room=60)
    assert_all_free(llm)
    print(
        f"{accepted} of {proposed} drafts; {len(finished)} answers, {len(aborted)} aborted, {preempted} preempted"
    )
    for name, answer in finished.items():
        assert answer == without[1][name], name


def test_random_conversations(llm: LLM) -> None:
    """Turns, resent prompts, aborts and preemptions: what is cached is what requests without drafts would leave."""
    cache = manager(llm).pool.prefixes
    if cache is None:
        pytest.skip("the family shares no pages")
    assert llm.reset_prefix_cache()
    order = random.Random(1)
    traffic = random_conversations(llm, RANDOM_REQUESTS, order, room=99, longest=600, vocabulary=250)
    assert traffic.hits > len(traffic.answers) // 4
    assert_all_free(llm)
    farthest = assert_equal_without_cache(llm, traffic.answers, TOLERANCE)
    print(f"{traffic}; log-probabilities within {farthest:.1e}; {cache.evicted_total} pages given away")
    assert_all_free(llm)
