"""Checkpoints with other weights, and whether an engine serves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

import vllm_fox.hf  # noqa: F401  # transformers then knows the models
from benchmarks.engines import generate

Weights = dict[str, torch.Tensor]


def changed(folder: Path, target: Path, change: Callable[[Weights], None]) -> Path:
    """A copy of a checkpoint with other weights."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        change(dict(model.named_parameters()))
    model.save_pretrained(target)
    return target


def larger_norms(weights: Weights) -> None:
    """QK-norm gains three times as large: logits and their bound are nine times as large."""
    for name, weight in weights.items():
        if "q_norm" in name or "k_norm" in name:
            weight.mul_(3)


def all_others(weights: Weights) -> None:
    larger_norms(weights)
    rng = torch.Generator().manual_seed(1)
    for weight in weights.values():
        weight.mul_(1 + 0.05 * torch.randn(weight.shape, generator=rng))


def wanted(folder: Path, tokens: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Log-probabilities of a text's tokens by the transformers model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def found(llm: LLM, tokens: list[int]) -> torch.Tensor:
    """The same by the engine."""
    (out,) = generate(llm, [tokens], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
    pairs = zip(out.prompt_logprobs[1:], tokens[1:], strict=True)
    return torch.tensor([at[token].logprob for at, token in pairs], dtype=torch.float64)
