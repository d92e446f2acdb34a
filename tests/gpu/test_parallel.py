"""Two GPUs: tensor ranks and pipeline stages under both executors answer as one GPU does, and give back as much."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

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
from tests.support.engines import assert_all_free

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
LAYOUTS = [
    {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
    {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
    {"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"},
]
LENGTHS = (2048, 700, 100)


def ask(llm: LLM, reference: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Greedy answers, mean NLL of the reference text, and the live share after an 8k prompt."""
    prompts = [source_tokens(llm, length, seed=length) for length in LENGTHS]
    answers = [list(out.outputs[0].token_ids) for out in generate(llm, prompts, greedy(64))]
    tokens = reference["input_ids"].tolist()
    (out,) = generate(llm, [tokens], greedy(1, prompt_logprobs=1))
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    add(llm, "long", source_tokens(llm, 8192, seed=1), 64)
    run_until_decoding(llm, tokens=8)
    live = usage(llm) * num_blocks(llm) / (8192 / 64)
    pages = manager(llm).pool.used
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_all_free(llm)
    return {"answers": answers, "nll": -sum(found) / len(found), "live": live, "pages": pages}


@pytest.fixture(scope="module")
def one(fox_18m: Path) -> Any:
    """The same on one GPU."""

    @cache
    def run() -> dict[str, Any]:
        options = GPU_DEFAULTS | {"enforce_eager": True}
        with engine(fox_18m, dtype="float32", max_model_len=16384, **options) as llm:
            return ask(llm, load_file(fox_18m / "reference.safetensors"))

    return run


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(str(v) for v in layout.values()))
def test_two_gpus_answer_as_one(layout: dict[str, Any], fox_18m: Path, one: Any) -> None:
    if layout["distributed_executor_backend"] == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    alone, reference = one(), load_file(fox_18m / "reference.safetensors")
    # Compiled code and graphs once: they are the same everywhere, and an engine starts sooner without.
    options = GPU_DEFAULTS | layout | {"enforce_eager": layout != LAYOUTS[0]}
    with engine(fox_18m, dtype="float32", max_model_len=16384, **options) as llm:
        found = ask(llm, reference)
    print(f"NLL {found['nll']:.6f}, live {found['live']:.3f}, one GPU {alone['live']:.3f}; pages {found['pages']}")
    assert found["answers"] == alone["answers"]
    assert found["nll"] == pytest.approx(reference["nll"].double().mean().item(), abs=2e-3)
    # Blocks are counted by the fuller rank.
    if "tensor_parallel_size" in layout:
        assert found["live"] <= 1.08 * alone["live"]
    assert sum(found["pages"]) == pytest.approx(sum(alone["pages"]), rel=0.01)
