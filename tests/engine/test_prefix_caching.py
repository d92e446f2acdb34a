"""Prefix caching on the shipped checkpoint: requests have the text and the likelihoods that they have without."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vllm import LLM

from benchmarks.engines import (
    add,
    engine,
    generate,
    manager,
    run_to_the_end,
    run_until_decoding,
    scheduler,
    source_tokens,
)
from tests.support.conversations import answer_of, assert_equal_without_cache, params, random_conversations
from tests.support.engines import assert_all_free

PAGE = 16
# More by hand: FOX_RANDOM_REQUESTS=500 pytest tests/engine/test_prefix_caching.py -k random
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "60"))
# Logits of up to 100 are rounded by 6e-6 in float32, and chunks that begin elsewhere add up in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    with engine(
        fox_tiny,
        {"page_size": PAGE},
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        num_gpu_blocks_override=100,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """Every test begins with an empty cache, and ends with no page lost."""
    assert llm.reset_prefix_cache()
    yield
    run_to_the_end(llm)
    assert_all_free(llm)
    pages = manager(llm)
    assert not pages._under_way and not pages._hashes and not pages._full_pages and not pages._shared_pages
    assert pages.pool.prefixes is not None and not pages.pool.prefixes._busy.any()


def test_it_is_on_and_natively(llm: LLM) -> None:
    """vLLM's own counters count."""
    assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    before = hits(llm)
    prompt = source_tokens(llm, 500)
    (first,) = generate(llm, [prompt], params(20))
    (again,) = generate(llm, [prompt], params(20))
    # Not the last token, whose logits are asked for; whole pages only.
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 499 // PAGE * PAGE)
    assert hits(llm) - before == again.num_cached_tokens
    assert answer_of(again).tokens == answer_of(first).tokens
    (off,) = generate(llm, [prompt], params(20, skip_reading_prefix_cache=True))
    assert off.num_cached_tokens == 0 and answer_of(off).tokens == answer_of(first).tokens


def hits(llm: LLM) -> int:
    return sum(int(x.value) for x in llm.get_metrics() if x.name == "vllm:prefix_cache_hits")  # type: ignore[union-attr]


def test_a_conversation_goes_on_from_its_last_page(llm: LLM) -> None:
    """Within answers too; an entry costs the live share only."""
    text, answers = source_tokens(llm, 300), []
    for turn in range(5):
        (out,) = generate(llm, [text], params(40))
        answers.append(answer_of(out))
        if turn:
            # All but the part of a page, and the last answer's last token, which was never read.
            assert out.num_cached_tokens == (len(answers[-2].prompt) + 39) // PAGE * PAGE
        text = text + answers[-1].tokens + source_tokens(llm, 50, seed=turn + 1)
    assert_equal_without_cache(llm, answers, TOLERANCE)


def test_the_live_range_at_every_boundary_is_exact(llm: LLM) -> None:
    """As it is for a request that has just that length."""
    prompt = source_tokens(llm, 700, seed=3)
    generate(llm, [prompt], params(1))
    cache = manager(llm).pool.prefixes
    assert cache is not None
    # By chunks of 256 tokens, every boundary inside of them is reported.
    found = list(cache._column.values())
    assert len(found) == 700 // PAGE
    first = cache._first[found].copy()
    assert (np.diff(first, axis=0) >= 0).all() and first[-1].max() > 20
    for pages in (3, 16, 17, 40):
        assert llm.reset_prefix_cache()
        generate(llm, [prompt[: pages * PAGE]], params(1))
        last = list(cache._column.values())[-1]
        assert np.array_equal(cache._first[last], first[pages - 1]), pages


def test_prompts_that_begin_alike_are_computed_once(llm: LLM) -> None:
    """Of a burst, and of n answers to one prompt."""
    shared = source_tokens(llm, 600, seed=5)
    prompts = [shared + [7 + row] * (5 + row) for row in range(5)]
    outs = generate(llm, prompts, params(5))
    assert [out.num_cached_tokens for out in outs] == [0] + [600 // PAGE * PAGE] * 4
    assert_equal_without_cache(llm, [answer_of(out) for out in outs], TOLERANCE)
    assert llm.reset_prefix_cache()
    before = hits(llm)
    (out,) = generate(llm, [shared], params(5, n=1))
    several = params(5)
    several.n, several.temperature = 4, 1.0
    assert llm.reset_prefix_cache()
    (out,) = generate(llm, [shared], several)
    assert len(out.outputs) == 4
    assert hits(llm) - before == 3 * (599 // PAGE * PAGE)


def test_a_shared_system_prompt(llm: LLM) -> None:
    """Two prompts that are alike up to the middle of a page share what comes before."""
    system = source_tokens(llm, 200, seed=6)
    first, second = (system + source_tokens(llm, 150, seed=seed) for seed in (7, 8))
    outs = [generate(llm, [prompt], params(10))[0] for prompt in (first, second)]
    assert [out.num_cached_tokens for out in outs] == [0, 200 // PAGE * PAGE]
    assert_equal_without_cache(llm, [answer_of(out) for out in outs], TOLERANCE)


def test_salt_keeps_apart(llm: LLM) -> None:
    prompt = source_tokens(llm, 300, seed=9)

    def ask(salt: str) -> int:
        (out,) = llm.generate([{"prompt_token_ids": prompt, "cache_salt": salt}], params(2), use_tqdm=False)
        assert out.num_cached_tokens is not None
        return out.num_cached_tokens

    assert [ask("one"), ask("two"), ask("one")] == [0, 0, 299 // PAGE * PAGE]


def test_reset(llm: LLM) -> None:
    """With and without running requests."""
    prompt = source_tokens(llm, 300, seed=10)
    generate(llm, [prompt], params(2))
    add(llm, "runs", prompt, 60)
    run_until_decoding(llm)
    assert not llm.reset_prefix_cache()  # as for vLLM's own models
    assert scheduler(llm).reset_prefix_cache(reset_running_requests=True)
    answer = run_to_the_end(llm)["runs"]
    (out,) = generate(llm, [prompt], params(60, skip_reading_prefix_cache=True))
    assert answer == list(out.outputs[0].token_ids)


def test_memory_that_is_cached_is_free(llm: LLM) -> None:
    """What ended last stays; what ended first goes, dead pages before whole ends."""
    prompts = [source_tokens(llm, 900, seed=seed) for seed in range(20, 34)]
    for prompt in prompts:
        generate(llm, [prompt], params(2))
    cache = manager(llm).pool.prefixes
    assert cache is not None and cache.evicted_total > 0
    cached = [generate(llm, [prompt + [5]], params(1))[0].num_cached_tokens for prompt in reversed(prompts)]
    # 100 blocks are fewer than two dense requests of this length; more conversations than that are still whole.
    whole = [count >= 896 for count in cached]
    assert whole.index(False) > 3 and not any(whole[whole.index(False) + 2 :])


@pytest.mark.parametrize("room", [99, 75], ids=["roomy", "preempts more"])
def test_random_conversations(llm: LLM, room: int) -> None:
    """Turns, resent prompts, aborts and preemptions: free pages are NaN, and nothing reads one."""
    order = random.Random(room)
    traffic = random_conversations(llm, RANDOM_REQUESTS // 2, order, room=room, longest=600, vocabulary=250)
    cache = manager(llm).pool.prefixes
    assert cache is not None and traffic.hits > len(traffic.answers) // 3
    farthest = assert_equal_without_cache(llm, traffic.answers, TOLERANCE)
    print(f"{traffic}; log-probabilities within {farthest:.1e}; {cache.evicted_total} pages given away")
