"""What vLLM users leave on, on the shipped checkpoint: every way of serving gives the text of a request alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from benchmarks.engines import (
    add,
    engine,
    generate,
    greedy,
    manager,
    num_blocks,
    run_to_the_end,
    run_until_decoding,
    scheduler,
    source_tokens,
    usage,
)
from tests.support.engines import assert_all_free, random_traffic

PAGE = 32
# Longer by hand: FOX_RANDOM_REQUESTS=300 FOX_RANDOM_LENGTH=4000 pytest tests/engine/test_serving.py -k random
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "30"))
RANDOM_LENGTH = int(os.environ.get("FOX_RANDOM_LENGTH", "1500"))
MAX_MODEL_LEN = max(2048, RANDOM_LENGTH + 64)


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    """Room for about three dense requests of 2k tokens, chunks of 256."""
    with engine(
        fox_tiny,
        {"page_size": PAGE},
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=3 * MAX_MODEL_LEN // PAGE + 8,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """After every test all pages are free and every count is zero."""
    yield
    run_to_the_end(llm)
    assert_all_free(llm)


def test_pages_come_back_while_the_request_runs(llm: LLM) -> None:
    """The gauge of vLLM's own metrics falls, and our counters agree with it."""
    before = manager(llm).pool.released_total
    add(llm, "a", source_tokens(llm, 1900, seed=1), 32)
    run_until_decoding(llm)
    pool = manager(llm).pool
    dense = -(-1900 // PAGE) * pool.streams.sum()
    assert pool.released_total > before
    assert pool.used_total == dense - (pool.released_total - before)
    assert usage(llm) == pytest.approx(pool.used_blocks / num_blocks(llm))
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:kv_cache_usage_perc"].value == pytest.approx(usage(llm), abs=0.02)
    assert metrics["vllm:fox_kv_pages_released"].value == pool.released_total
    assert metrics["vllm:fox_kv_pages_live"].value == pool.used_total


def test_free_pages_are_nan(llm: LLM) -> None:
    """``fox.poison_free_pages``, with which the tests' engines run: also pages that a request has written."""
    add(llm, "a", source_tokens(llm, 900, seed=1), 8)
    run_until_decoding(llm)
    pool = manager(llm).pool
    (slot,) = manager(llm)._slot_of.values()
    written = set(pool.held_ids(slot, 0).tolist())
    run_to_the_end(llm)
    llm.reset_prefix_cache()  # its full pages are free now, too
    add(llm, "b", source_tokens(llm, 40, seed=2), 8)
    run_until_decoding(llm)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    layer = next(layer for layer in layers.values() if hasattr(layer, "page_format"))
    nan = (layer.pool().view(-1, layer.page_format.page_bytes) == 0xFF).all(1)
    free = set(pool.free_ids(0).tolist())
    assert {int(page) for page in nan.nonzero()} == free
    assert len(written & free) > len(written) // 2
    assert not layer.pool()[: layer.page_format.page_bytes].any()  # padding


def test_transformers_model_gives_the_same_likelihoods(llm: LLM, fox_tiny: Path) -> None:
    """One checkpoint, two implementations of its architecture; and the same greedy text."""
    import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)

    model = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32).eval()
    prompt = source_tokens(llm, 700, seed=5)
    (out,) = generate(llm, [prompt], greedy(24, prompt_logprobs=1))
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    want = logits.gather(1, ids[0, 1:, None])[:, 0]
    # Each is float32, whose u is 6e-8: some deviations of all layers' roundings of logits of 20.
    assert (torch.tensor(found) - want).abs().max() < 5e-5
    text = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert text[0, len(prompt) :].tolist() == list(out.outputs[0].token_ids)


def test_released_pages_serve_other_requests_at_once(llm: LLM) -> None:
    """Memory for one request that forgets nothing: admission learns what requests hold, and lets several in."""
    blocks = scheduler(llm).kv_cache_manager.block_pool
    aside = blocks.get_new_blocks(num_blocks(llm) - 90)
    for i in range(6):
        add(llm, f"r{i}", source_tokens(llm, 1800, seed=i), 48)
    together = preempted = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        running = scheduler(llm).running
        together = max(together, len(running))
        preempted += sum(request.num_preemptions for request in running)
    blocks.free_blocks(aside)
    print(f"{together} at once")
    assert together >= 4
    assert preempted == 0


def test_random_requests_equal_their_solo_runs(llm: LLM) -> None:
    """Lengths, arrivals, aborts and preemptions at random, in a budget that is scarce for all of them."""
    order = random.Random(0)
    requests = {
        f"q{i}": (source_tokens(llm, order.randint(1, RANDOM_LENGTH), seed=i), order.randint(1, 60))
        for i in range(RANDOM_REQUESTS)
    }
    # One request must fit, should it forget nothing.
    room = -(-(RANDOM_LENGTH + 60) // PAGE) + 1
    finished, aborted, preempted = random_traffic(llm, requests, order, room)
    print(f"{len(finished)} finished, {len(aborted)} aborted, {preempted} preemptions")
    assert aborted and preempted > len(requests) // 10
    assert set(finished) >= set(requests) - aborted
    for name in sorted(set(requests) - aborted):
        prompt, tokens = requests[name]
        (alone,) = generate(llm, [prompt], greedy(tokens))
        assert finished[name] == list(alone.outputs[0].token_ids), name


def test_answers_that_outgrow_memory_preempt_without_storms(llm: LLM) -> None:
    """Many requests with short prompts and long answers: some must give way, none again and again."""
    requests = {f"g{i}": (source_tokens(llm, 100 + 10 * i, seed=i), 300) for i in range(10)}
    sched = scheduler(llm)
    blocks = sched.kv_cache_manager.block_pool
    aside = blocks.get_new_blocks(num_blocks(llm) - 34)
    for name, request in requests.items():
        add(llm, name, *request)
    finished: dict[str, list[int]] = {}
    preempted: dict[str, int] = {}
    while llm.llm_engine.has_unfinished_requests():
        for out in llm.llm_engine.step():
            if out.finished:
                finished[out.request_id] = list(out.outputs[0].token_ids)
        for request in sched.requests.values():
            preempted[request.request_id] = request.num_preemptions
    blocks.free_blocks(aside)
    print(f"{sum(preempted.values())} preemptions, at most {max(preempted.values())} of a request")
    assert sum(preempted.values()) > 0 and max(preempted.values()) <= 3
    for name in ("g0", "g8", "g9"):
        (alone,) = generate(llm, [requests[name][0]], greedy(300))
        assert finished[name] == list(alone.outputs[0].token_ids), name


def test_forced_preemption_and_resumption(llm: LLM) -> None:
    """Preempted in the middle of its answer, a request resumes with the same text."""
    prompt = source_tokens(llm, 900, seed=9)
    (alone,) = generate(llm, [prompt], greedy(40))
    add(llm, "p", prompt, 40)
    run_until_decoding(llm, tokens=10)
    sched = scheduler(llm)
    request = sched.running.pop()
    sched._preempt_request(request, 0.0)
    assert manager(llm).pool.used_total == 0
    assert next(iter(run_to_the_end(llm).values())) == list(alone.outputs[0].token_ids)


def test_chunk_size_does_not_matter(llm: LLM, fox_tiny: Path) -> None:
    prompts = [source_tokens(llm, n, seed=n) for n in (5, 255, 256, 257, 1500)]
    chunked = [list(out.outputs[0].token_ids) for out in generate(llm, prompts, greedy(16))]
    solo = [list(generate(llm, [prompt], greedy(16))[0].outputs[0].token_ids) for prompt in prompts]
    assert chunked == solo


def test_parallel_samples_seeds_and_stops(llm: LLM) -> None:
    # vLLM's CPU worker cannot seed a request whose prompt is cut into chunks, whatever the model: 3 * 80 < 256.
    prompt = source_tokens(llm, 80, seed=2)
    params = SamplingParams(temperature=0.8, n=3, seed=7, max_tokens=24)
    first, second = (generate(llm, [prompt], params)[0] for _ in range(2))
    texts = [out.text for out in first.outputs]
    assert texts == [out.text for out in second.outputs]
    assert len(set(texts)) > 1
    (whole,) = generate(llm, [prompt], greedy(24))
    stop = whole.outputs[0].text[5:8]
    (cut,) = generate(llm, [prompt], SamplingParams(temperature=0, max_tokens=24, stop=[stop]))
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].text == whole.outputs[0].text.split(stop)[0]


def test_logprobs_of_prompt_and_answer(llm: LLM) -> None:
    """The answer's logprobs equal the prompt logprobs of the same tokens sent as a prompt."""
    prompt = source_tokens(llm, 400, seed=3)
    (out,) = generate(llm, [prompt], greedy(16, logprobs=0))
    answer = list(out.outputs[0].token_ids)
    decoded = [at[token].logprob for at, token in zip(out.outputs[0].logprobs, answer, strict=True)]
    (again,) = generate(llm, [prompt + answer], greedy(1, prompt_logprobs=0))
    sent = [at[token].logprob for at, token in zip(again.prompt_logprobs[400:], answer, strict=True)]
    # Other kernels and orders of sums, in float32: roundings of all layers of logits of 20.
    assert decoded == pytest.approx(sent, abs=3e-5)


def test_structured_output(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=8, structured_outputs=StructuredOutputsParams(choice=["yes", "no"])
    )
    (out,) = generate(llm, [source_tokens(llm, 64)], params)
    assert out.outputs[0].text in ("yes", "no")


def test_startup_capacity_is_the_dense_one(llm: LLM) -> None:
    """What vLLM logs at start-up: a request that never forgets must be servable."""
    cache = llm.llm_engine.vllm_config.cache_config
    blocks = cache.num_gpu_blocks
    assert cache.block_size == PAGE
    per_request = -(-MAX_MODEL_LEN // PAGE)
    assert cache.kv_cache_max_concurrency == pytest.approx(blocks / per_request)
