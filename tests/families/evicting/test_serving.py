"""Checkpoints that evict tokens, as published, converted and served by the real engine, against their formula."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from vllm import LLM, RequestOutput

from benchmarks.engines import engine, generate, greedy, manager, num_blocks, run_until_decoding, step, usage
from tests.support.engines import assert_all_free, random_traffic
from tests.support.evicting import THRESHOLD, VARIANTS, Made, make_evicting
from tests.support.reference_evicting import reference_logits

PAGE = 16
SERVED = {"page_size": PAGE}
OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 160, "max_num_seqs": 6, "num_gpu_blocks_override": 80}


@pytest.fixture(scope="module", params=VARIANTS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


@pytest.fixture(scope="module")
def llm(made: Made) -> Iterator[LLM]:
    with engine(made.served, SERVED, **OPTIONS) as llm:
        yield llm


def formula(made: Made, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_logits(made.published, tokens, made.predictor, THRESHOLD, made.window)


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, 257, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def live_tokens(evicted: torch.Tensor, window: int, length: int) -> torch.Tensor:
    """[layers, KV heads] tokens that the query after ``length`` tokens may see."""
    return (~evicted[:, :, :length] | (length - torch.arange(length) <= window)).sum(-1)


def test_likelihoods_are_the_formulas(llm: LLM, made: Made) -> None:
    """Of a prompt in several chunks and of its answer; and a request holds little more than its live tokens."""
    prompt, asked, looked = random_prompt(501, seed=1), 40, 24
    params = greedy(asked, prompt_logprobs=0, logprobs=0)
    llm.llm_engine.add_request("one", {"prompt_token_ids": prompt}, params)
    run_until_decoding(llm, tokens=looked)
    (slot,) = manager(llm)._slot_of.values()
    held, length = manager(llm).pool.held_ids(slot, 0).size, 501 + looked - 1
    assert usage(llm) == pytest.approx(-(-held // manager(llm).pool.streams[0]) / num_blocks(llm))
    (out,) = [one for one in until_finished(llm) if one.finished]
    tokens = prompt + list(out.outputs[0].token_ids)
    want, evicted = formula(made, tokens)
    want = want.log_softmax(-1)
    assert out.prompt_logprobs is not None and out.outputs[0].logprobs is not None
    at = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
    for position, (found, token) in enumerate(zip(at, tokens[1:], strict=True)):
        assert found is not None
        # float32's roundoff on logits of at most some ten, through two layers.
        assert found[token].logprob == pytest.approx(want[position, token].item(), abs=2e-4)
    live = live_tokens(evicted, made.window, length)
    # Pages that are begun, and evicted tokens that wait for the next compaction.
    assert live.sum() / PAGE <= held <= (live / PAGE + 3).sum()
    assert_all_free(llm)


def test_memory_falls_while_a_request_decodes(llm: LLM, made: Made) -> None:
    """vLLM's own gauge: it rises as pages are begun, and falls as compaction empties others."""
    generate(llm, [[1]], greedy(1))
    llm.llm_engine.add_request("one", {"prompt_token_ids": random_prompt(60, seed=3)}, greedy(200))
    run_until_decoding(llm, tokens=made.window)
    seen = []
    for _ in until_finished(llm):
        seen.append(usage(llm))
    falls = sum(after < before for before, after in itertools.pairwise(seen[:-1]))
    assert falls == 0 if made.published.parent.name.startswith("llama-disabled") else falls > 1
    assert_all_free(llm)


def until_finished(llm: LLM) -> Iterator[RequestOutput]:
    while llm.llm_engine.has_unfinished_requests():
        yield from step(llm)


def test_random_requests_are_answered_as_alone(llm: LLM) -> None:
    """With aborts, and in so little memory that requests are preempted."""
    order, count = random.Random(0), int(os.environ.get("FOX_RANDOM_REQUESTS", "12"))
    requests = {str(n): (random_prompt(order.randint(2, 400), seed=n), order.randint(1, 60)) for n in range(count)}
    finished, aborted, preempted = random_traffic(llm, requests, order, room=40)
    assert_all_free(llm)
    for name, (prompt, answer) in requests.items():
        if name not in aborted:
            (alone,) = generate(llm, [prompt], greedy(answer))
            assert finished[name] == list(alone.outputs[0].token_ids)
    print(f"{len(finished)} answers; {len(aborted)} requests aborted, preempted {preempted} times")
