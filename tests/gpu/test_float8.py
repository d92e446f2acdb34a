"""Float8 pages on a CUDA GPU: what they cost in likelihood and give in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.engines import GPU_DEFAULTS, engine, generate, greedy, manager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA GPU with float8, compute capability 8.9 or later",
    ),
]


def test_likelihood_and_page_size(fox_18m: Path) -> None:
    reference = load_file(fox_18m / "reference.safetensors")
    tokens, official = reference["input_ids"].tolist(), reference["nll"].double().mean().item()
    options = GPU_DEFAULTS | {"kv_cache_dtype": "fp8"}
    with engine(fox_18m, dtype="bfloat16", max_model_len=16384, **options) as llm:
        (out,) = generate(llm, [tokens], greedy(64, prompt_logprobs=1))
        form = manager(llm).kv_cache_spec.page_format
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    nll = -sum(found) / len(found)
    print(f"mean NLL with float8 pages {nll:.6f}, official in bfloat16 {official:.6f}")
    assert nll == pytest.approx(official, abs=0.02)
    assert form.page_bytes < 0.56 * 2 * 64 * 64 * 2  # of K and V in bfloat16
