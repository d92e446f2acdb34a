"""A checkpoint by the official code: official numbers, and what is promised of its KV cache.

The checkpoint is too large to ship. Put it beside the checkout (``../shared/checkpoints/fox-pro-code-18m``) to run
these; they skip otherwise, and say so.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
from tests.support.engines import assert_all_free

PAGE = 64


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-3), ("bfloat16", 1e-2)])
def test_log_likelihood_and_argmax_are_the_official_ones(fox_18m: Path, dtype: str, tolerance: float) -> None:
    reference = load_file(fox_18m / "reference.safetensors")
    tokens = reference["input_ids"].tolist()
    with engine(fox_18m, dtype=dtype, max_model_len=2048, num_gpu_blocks_override=64) as llm:
        (out,) = generate(llm, [tokens], greedy(1, prompt_logprobs=1, logprobs=1))
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    nll = -sum(found) / len(found)
    expected = reference["nll"].double().mean().item()
    print(f"{dtype}: mean NLL {nll:.6f}, official {expected:.6f}")
    assert nll == pytest.approx(expected, abs=tolerance)
    if dtype == "float32":
        after = [*out.prompt_logprobs[1:], out.outputs[0].logprobs[0]]  # predictions after each prompt token
        best = [min(at.items(), key=lambda item: item[1].rank)[0] for at in after]
        at_positions = [best[p] for p in reference["positions"].tolist()]
        assert at_positions == reference["logits"].float().argmax(-1).tolist()


def test_release_and_pruning_change_no_token(fox_18m: Path) -> None:
    outputs = []
    for fox in ({"release": True}, {"release": False}, {"log_pruning_tolerance": None}):
        with engine(fox_18m, fox, max_model_len=4096, num_gpu_blocks_override=130) as llm:
            (out,) = generate(llm, [source_tokens(llm, 2048, seed=5)], greedy(256))
            released = manager(llm).pool.released_total
            assert (released > 0) == (fox == {"release": True})
            assert_all_free(llm)
        outputs.append(list(out.outputs[0].token_ids))
    assert len(outputs[0]) == 256
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("length, most", [(8192, 0.25), (16000, 0.21)])
def test_live_kv_after_a_long_prompt(fox_18m: Path, length: int, most: float) -> None:
    """Read from vLLM's own usage gauge, against the same request without release."""
    with engine(fox_18m, {"page_size": PAGE}, max_model_len=16384, num_gpu_blocks_override=300) as llm:
        add(llm, "long", source_tokens(llm, length, seed=1), 4)
        run_until_decoding(llm)
        live = usage(llm) * num_blocks(llm)
        dense = -(-length // PAGE)
        print(f"{length} tokens: {live:.0f} of {dense} blocks live, {100 * live / dense:.1f} %")
        assert live <= most * dense
        run_to_the_end(llm)
        assert_all_free(llm)


@pytest.mark.parametrize("release, at_least, at_most", [(True, 7, 99), (False, 2, 2)])
def test_a_budget_of_two_dense_requests(fox_18m: Path, release: bool, at_least: int, at_most: int) -> None:
    """Requests of 8k tokens: with release at least seven run at once, and none is preempted."""
    blocks = 2 * (8192 // PAGE) + 1
    with engine(fox_18m, {"release": release}, max_model_len=8192, num_gpu_blocks_override=blocks) as llm:
        for i in range(8 if release else 3):
            add(llm, f"r{i}", source_tokens(llm, 8192 - 160, seed=i), 144 if release else 8)
        together, preempted = 0, 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            running = scheduler(llm).running
            together = max(together, len(running))
            preempted += sum(request.num_preemptions for request in running)
        print(f"release {release}: {together} at once, {preempted} preemptions")
        assert at_least <= together <= at_most
        assert preempted == 0
        assert_all_free(llm)


def test_reference_is_the_official_implementations(fox_18m: Path) -> None:
    """Guards the fixture itself: shapes and a plausible loss."""
    reference = load_file(fox_18m / "reference.safetensors")
    assert reference["logits"].shape == (128, 4096) and reference["nll"].shape == (1023,)
    assert 0.2 < reference["nll"].float().mean() < 1.0 and torch.isfinite(reference["logits"].float()).all()
