"""Decoders that evict tokens on a CUDA GPU, with vLLM's default flags: compiled, asynchronous, with CUDA graphs."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm import LLM

from benchmarks.engines import GPU_DEFAULTS, engine, generate, greedy, manager
from tests.support.engines import assert_all_free, compiled_kernels, random_traffic
from tests.support.evicting import THRESHOLD, VARIANTS, Made, Variant, make_evicting
from tests.support.reference_evicting import reference_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module", params=["qwen3-borrowed", "llama-adapter", "mistral-mlp"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp(request.param), VARIANTS[request.param])


@pytest.fixture(scope="module")
def llm(made: Made) -> Iterator[LLM]:
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
    with engine(made.served, max_model_len=2048, compilation_config=graphs, **GPU_DEFAULTS) as started:
        before = compiled_kernels()
        assert any("subset" in name for name in before)
        yield started
        # Everything was compiled before the first request.
        assert before == compiled_kernels()


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 257), k=length)


def test_likelihoods_are_the_formulas(llm: LLM, made: Made) -> None:
    """Of an answer, whose steps replay a graph, after a prompt of several tiles."""
    config = llm.llm_engine.vllm_config
    assert config.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
    tokens = prompt(700)
    (out,) = generate(llm, [tokens], greedy(100, logprobs=0))
    answer = list(out.outputs[0].token_ids)
    logits, _ = reference_logits(made.published, tokens + answer, made.predictor, THRESHOLD, made.window)
    want = logits[len(tokens) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    found = [at[token].logprob for at, token in zip(out.outputs[0].logprobs, answer, strict=True)]
    torch.testing.assert_close(torch.tensor(found).double(), want, atol=1e-3, rtol=0)
    assert manager(llm).pool.released_total > 0
    assert_all_free(llm)


def test_random_requests_are_answered_as_alone(llm: LLM) -> None:
    """With aborts and preemptions."""
    order, count = random.Random(0), int(os.environ.get("FOX_RANDOM_REQUESTS", "40"))
    requests = {str(n): (prompt(order.randint(2, 1500), seed=n), order.randint(1, 100)) for n in range(count)}
    finished, aborted, preempted = random_traffic(llm, requests, order, room=60)
    assert_all_free(llm)
    alone = generate(
        llm, [requests[name][0] for name in finished], [greedy(requests[name][1]) for name in finished]
    )
    for (name, answer), out in zip(finished.items(), alone, strict=True):
        assert answer == list(out.outputs[0].token_ids), name
    print(f"{len(finished)} answers; {len(aborted)} requests aborted, preempted {preempted} times")


def log_probabilities(
    model: Path, tokens: list[int], quantization: str | None, backend: str | None
) -> torch.Tensor:
    """[T - 1] of a prompt's tokens, in bfloat16."""
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    options = {"dtype": "bfloat16", "max_model_len": 2048, "compilation_config": graphs, **GPU_DEFAULTS}
    with engine(model, quantization=quantization, attention_backend=backend, **options) as llm:
        (out,) = generate(llm, [tokens], greedy(1, prompt_logprobs=0))
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    return torch.tensor(found).double()


@pytest.mark.parametrize("variant", [Variant("llama", "linear"), VARIANTS["mistral-mlp"]], ids=lambda one: one.base)
def test_float8_weights_cost_no_more_than_in_the_dense_model(tmp_path: Path, variant: Variant) -> None:
    """Quantised while they are loaded, in the model with a predictor beside it and in the same model without."""
    made, tokens = make_evicting(tmp_path, variant), prompt(1500)
    lost = []
    # Some builds of FlashAttention have no kernel for heads of 32.
    for model, backend in ((made.published, "TRITON_ATTN"), (made.served, None)):
        before, after = (log_probabilities(model, tokens, quantization, backend) for quantization in (None, "fp8"))
        assert not torch.equal(before, after)
        lost.append(before - after)
    dense, evicting = lost
    # Rounding moves each token's log-probability up or down. The means of so many tokens differ by chance by about
    # this much, and five times as much does not happen by chance.
    chance = ((dense.var() + evicting.var()) / len(dense)).sqrt()
    print(f"lost of the NLL: dense {dense.mean():.4f}, evicting {evicting.mean():.4f}; by chance {chance:.4f}")
    assert evicting.mean() - dense.mean() < 5 * chance
    # A token that is evicted because of rounding makes a difference that a dense model has not, but few are.
    assert evicting.square().mean() < 2 * dense.square().mean()
