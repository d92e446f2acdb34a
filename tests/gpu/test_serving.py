"""On a CUDA GPU, with vLLM's default flags: compiled, CUDA graphs, asynchronous scheduling, V2 model runner."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from benchmarks.engines import (
    GPU_DEFAULTS,
    add,
    engine,
    generate,
    greedy,
    manager,
    num_blocks,
    run_until_decoding,
    source_tokens,
    usage,
)
from tests.support.engines import assert_all_free, compiled_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def llm(request: pytest.FixtureRequest, fox_18m: Path) -> Iterator[LLM]:
    with engine(fox_18m, dtype=request.param, max_model_len=16384, **GPU_DEFAULTS) as started:
        before = compiled_kernels()
        assert any("forgetting" in name for name in before)
        yield started
        # Everything was compiled before the first request.
        assert before == compiled_kernels()


def test_default_flags_give_the_v2_runner_and_graphs(llm: LLM) -> None:
    config = llm.llm_engine.vllm_config
    print(config.compilation_config.mode, config.compilation_config.cudagraph_mode)
    assert config.use_v2_model_runner
    assert config.scheduler_config.async_scheduling
    assert config.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"


def test_log_likelihood_and_argmax_are_the_official_ones(llm: LLM, fox_18m: Path) -> None:
    reference = load_file(fox_18m / "reference.safetensors")
    tokens = reference["input_ids"].tolist()
    (out,) = generate(llm, [tokens], greedy(1, prompt_logprobs=1, logprobs=1))
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    nll, expected = -sum(found) / len(found), reference["nll"].double().mean().item()
    exact = llm.llm_engine.vllm_config.model_config.dtype == torch.float32
    print(f"mean NLL {nll:.6f}, official {expected:.6f}")
    assert nll == pytest.approx(expected, abs=2e-3 if exact else 1e-2)
    after = [*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]
    best = [min(at.items(), key=lambda item: item[1].rank)[0] for at in after]
    same = [
        best[p] == a
        for p, a in zip(
            reference["positions"].tolist(), reference["logits"].float().argmax(-1).tolist(), strict=True
        )
    ]
    assert all(same) if exact else sum(same) >= 0.98 * len(same)


@pytest.mark.parametrize("length, most", [(8192, 0.25), (16000, 0.21)])
def test_live_kv_after_a_long_prompt(llm: LLM, length: int, most: float) -> None:
    add(llm, "long", source_tokens(llm, length, seed=1), 64)
    run_until_decoding(llm, tokens=8)
    live, dense = usage(llm) * num_blocks(llm), -(-length // 64)
    print(f"{length} tokens: {live:.0f} of {dense} blocks live, {100 * live / dense:.1f} %")
    assert live <= most * dense
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_all_free(llm)


def test_batched_requests_equal_their_solo_runs(llm: LLM) -> None:
    """Asynchronous scheduling, reports a step or two late, slots and pages changing hands."""
    if llm.llm_engine.vllm_config.model_config.dtype != torch.float32:
        pytest.skip("batches of other sizes round differently in bfloat16")
    prompts = [source_tokens(llm, 100 + 531 * i, seed=i) for i in range(8)]
    together = generate(llm, prompts, greedy(48))
    assert manager(llm).pool.released_total > 0
    for prompt, out in zip(prompts, together, strict=True):
        (alone,) = generate(llm, [prompt], greedy(48))
        assert list(alone.outputs[0].token_ids) == list(out.outputs[0].token_ids)
    assert_all_free(llm)
