"""Cached pages in host memory on the shipped checkpoint: what GPU memory has no room for comes back on a hit."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from benchmarks.engines import engine, generate, manager, run_to_the_end, source_tokens, step
from tests.support.conversations import answer_of, assert_equal_without_cache, params, random_conversations
from tests.support.engines import assert_all_free
from vllm_fox.pages.host_tier import HostTier

PAGE = 16
# More by hand: FOX_RANDOM_REQUESTS=500 pytest tests/engine/test_host_cache.py -k random
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "40"))
# Logits of up to 100 are rounded by 6e-6 in float32, and chunks that begin elsewhere add up in another order.
TOLERANCE = 1e-5
BLOCKS = 48


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    with engine(
        fox_tiny,
        {"page_size": PAGE, "host_cache_gib": 0.25},
        max_model_len=704,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        num_gpu_blocks_override=BLOCKS,
    ) as started:
        yield started


def tier(llm: LLM) -> HostTier:
    host = manager(llm).host
    assert host is not None
    return host


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """Every test begins with empty caches, and ends with no page lost."""
    assert llm.reset_prefix_cache()
    generate(llm, [[5]], params(1))
    assert tier(llm).used_total == 0
    yield
    run_to_the_end(llm)
    assert_all_free(llm)
    assert not tier(llm).is_fetching and not tier(llm)._fetching and not tier(llm)._book._busy.any()


def test_conversations_come_back(llm: LLM) -> None:
    """All of more than device memory has room for, with the answers that they have without a cache."""
    prompts = [source_tokens(llm, 600, seed=seed) for seed in range(20, 32)]
    before = counts(llm)
    firsts = [answer_of(generate(llm, [prompt], params(2))[0]) for prompt in prompts]
    assert tier(llm).saved_total and not tier(llm).fetched_total
    answers = []
    for first in firsts:
        (out,) = generate(llm, [first.prompt + first.tokens + [5] * 20], params(10))
        answers.append(answer_of(out))
        assert out.num_cached_tokens == 601 // PAGE * PAGE
    assert_equal_without_cache(llm, answers, TOLERANCE)
    # What vLLM shows of it.
    change = {name: count - before.get(name, 0) for name, count in counts(llm).items()}
    host, page_bytes = tier(llm), manager(llm).kv_cache_spec.page_format.page_bytes
    assert host.fetched_total > 0
    assert change["vllm:fox_kv_pages_from_host"] == host.fetched_total
    assert change["vllm:fox_kv_pages_to_host"] == host.saved_total
    assert change["vllm:fox_host_bytes to"] == host.saved_total * page_bytes
    assert change["vllm:fox_host_bytes from"] == host.fetched_total * page_bytes
    assert change["vllm:fox_prefix_cache_host_hits"] > 5 * (600 // PAGE * PAGE)
    assert counts(llm)["vllm:fox_kv_pages_in_host"] == host.used_total > 0


def counts(llm: LLM) -> dict[str, int]:
    """Values of the plugin's metrics, by name and direction."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:fox") and "layer" not in metric.labels and hasattr(metric, "value"):
            direction = metric.labels.get("direction")
            found[f"{metric.name} {direction}" if direction else metric.name] = int(metric.value)
    return found


def test_requests_that_begin_alike_wait_for_one_fetch(llm: LLM) -> None:
    """Others run meanwhile, and a request that is aborted while it waits loses nothing."""
    prompt = source_tokens(llm, 600, seed=3)
    (first,) = generate(llm, [prompt], params(2))
    for seed in range(50, 60):
        generate(llm, [source_tokens(llm, 600, seed=seed)], params(1))
    fetched = tier(llm).last_fetch
    llm.llm_engine.add_request("aborted", {"prompt_token_ids": prompt + [6]}, params(5))
    step(llm)
    assert tier(llm).last_fetch == fetched + 1
    llm.llm_engine.abort_request(["aborted"])
    outs = generate(llm, [prompt + [5] * row for row in range(1, 4)], params(5))
    assert tier(llm).last_fetch == fetched + 1
    assert [out.num_cached_tokens for out in outs] == [600 // PAGE * PAGE] * 3
    assert_equal_without_cache(llm, [answer_of(out) for out in outs], TOLERANCE)


def test_salt_keeps_apart_and_reset_forgets(llm: LLM) -> None:
    prompt = source_tokens(llm, 600, seed=9)

    def ask(salt: str) -> int:
        (out,) = llm.generate([{"prompt_token_ids": prompt, "cache_salt": salt}], params(2), use_tqdm=False)
        assert out.num_cached_tokens is not None
        return out.num_cached_tokens

    assert [ask("one"), ask("two")] == [0, 0]
    for seed in range(60, 70):
        generate(llm, [source_tokens(llm, 600, seed=seed)], params(1))
    before = tier(llm).last_fetch
    assert [ask("three"), ask("one"), ask("two")] == [0, 599 // PAGE * PAGE, 599 // PAGE * PAGE]
    assert tier(llm).last_fetch > before
    for seed in range(60, 70):
        generate(llm, [source_tokens(llm, 600, seed=seed)], params(1))
    assert llm.reset_prefix_cache()
    assert ask("one") == 0 and tier(llm).used_total == 0


def test_random_conversations(llm: LLM) -> None:
    """Turns, resent prompts, aborts and preemptions: free pages are NaN, and nothing reads one."""
    order, before = random.Random(1), tier(llm).fetched_total
    traffic = random_conversations(llm, RANDOM_REQUESTS, order, room=BLOCKS - 1, longest=600, vocabulary=250)
    back = tier(llm).fetched_total - before
    assert traffic.hits > len(traffic.answers) // 3 and back
    farthest = assert_equal_without_cache(llm, traffic.answers, TOLERANCE)
    print(f"{traffic}; log-probabilities within {farthest:.1e}; {back} pages came back")
