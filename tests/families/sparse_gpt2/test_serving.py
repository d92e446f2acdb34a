"""Dynamic Context Pruning in the real engine: the formula's logits, and pages that come back while requests run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from benchmarks.engines import add, engine, generate, greedy, manager, run_to_the_end, scheduler, source_tokens
from tests.support.checkpoints import save_sparse_gpt2
from tests.support.engines import assert_all_free, random_traffic
from tests.support.reference_sparse_gpt2 import reference
from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config

PAGE = 16
LENGTH = 512
CHUNK = 64


@pytest.fixture(scope="module", params=["shipped", "by_layer"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, dcp_tiny: Path) -> Iterator[LLM]:
    """A model whose layers hand up what they drop, and one whose do not."""
    folder = dcp_tiny
    if request.param == "by_layer":
        folder = save_sparse_gpt2(tmp_path_factory.mktemp("sparse"), block_size=LENGTH, propagate_in_depth=False)
    blocks = 3 * LENGTH // PAGE + 1
    with engine(
        folder, max_model_len=LENGTH, max_num_batched_tokens=CHUNK, num_gpu_blocks_override=blocks
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    run_to_the_end(llm)
    assert_all_free(llm)


def formula(llm: LLM, token_ids: list[int]) -> tuple[torch.Tensor, list[list[list[int]]]]:
    """Log-probabilities [T - 1] of tokens after the first in float64, and what each layer and token sees."""
    folder = Path(llm.llm_engine.model_config.model)
    config = SparseGPT2Config.from_pretrained(folder)
    logits, seen = reference(config, load_file(folder / "model.safetensors"), token_ids)
    found = logits[:-1].log_softmax(-1).gather(1, torch.tensor(token_ids[1:])[:, None])
    return found[:, 0], seen


def test_prompts_in_chunks_and_answers_are_the_formulas(llm: LLM) -> None:
    """Teacher-forced over the engine's own answer: chunks of a prompt, and decoding token by token."""
    tokens = source_tokens(llm, 3 * CHUNK + 17)
    (out,) = generate(llm, [tokens], greedy(40, prompt_logprobs=0, logprobs=0))
    answer = list(out.outputs[0].token_ids)
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    found += [at[token].logprob for at, token in zip(out.outputs[0].logprobs, answer, strict=True)]
    want, seen = formula(llm, tokens + answer)
    shares = [sum(map(len, layer)) / (len(want) * len(want) / 2) for layer in seen]
    assert 0 < min(shares) < 0.9 and max(shares) > 0.05
    # Roundings to float32 of all layers, of logits of 20.
    torch.testing.assert_close(torch.tensor(found).double(), want, atol=3e-5, rtol=0)


def test_a_request_holds_little_more_than_its_live_tokens(llm: LLM) -> None:
    """At most 1.25 times the live tokens and two pages a layer, in every step of an answer."""
    tokens = source_tokens(llm, 300, seed=1)
    (out,) = generate(llm, [tokens], greedy(120))
    answer = list(out.outputs[0].token_ids)
    _, seen = formula(llm, tokens + answer)
    add(llm, "r", tokens, 120)
    held = {}
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        if scheduler(llm).running:
            held[scheduler(llm).running[0].num_computed_tokens] = manager(llm).pool.used_total
    assert len(held) > 120
    for length, pages in held.items():
        if length >= len(tokens):
            live = [len(layer[length - 1]) + 1 for layer in seen]
            assert sum(-(-n // PAGE) for n in live) <= pages <= sum(1.25 * n / PAGE + 2 for n in live)
    # Far from dense; how far depends on the text, which is another one in each Python's library.
    assert pages < 0.75 * len(seen) * -(-length // PAGE)


def test_random_requests_equal_their_solo_runs(llm: LLM) -> None:
    """Many at once, in a budget that is scarce, with aborts and preemptions: the text of a request alone."""
    order = random.Random(0)
    lengths = [(order.randint(1, 400), order.randint(1, 60)) for _ in range(20)]
    requests = {f"q{i}": (source_tokens(llm, n, seed=i), answer) for i, (n, answer) in enumerate(lengths)}
    finished, aborted, preempted = random_traffic(llm, requests, order, room=460 // PAGE + 2)
    assert aborted and preempted > 0
    assert set(finished) >= set(requests) - aborted
    for name in sorted(set(requests) - aborted):
        tokens, count = requests[name]
        (alone,) = generate(llm, [tokens], greedy(count))
        assert finished[name] == list(alone.outputs[0].token_ids), name
