"""LoRA adapters as PEFT saves them, and checkpoints with an adapter merged into their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM
from vllm.lora.request import LoRARequest

from benchmarks.engines import greedy, manager
from tests.support.engines import assert_all_free
from tests.support.evicting import THRESHOLD, Made
from tests.support.quantised import PROJECTIONS, fox_likelihood, rms
from tests.support.reference_evicting import reference_logits

RANK, ALPHA = 4, 8.0
PROMPT = torch.randint(1, 257, (300,), generator=torch.Generator().manual_seed(1)).tolist()

Likelihood = Callable[[Path, list[int]], torch.Tensor]
Answer = tuple[list[int], torch.Tensor, int]


def make_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write an adapter of all projections of a checkpoint, with random numbers large enough to change its text."""
    draw = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    for name, weight in load_file(model / "model.safetensors").items():
        if PROJECTIONS.fullmatch(name):
            layer, (rows, columns) = name.removesuffix(".weight"), weight.shape
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) * 0.1
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw) * 0.1
            targets.add(layer.rpartition(".")[2])
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": sorted(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(folder: Path, model: Path, adapter: Path) -> Path:
    """Write the checkpoint that computes what the model does with the adapter: W + alpha / r B A."""
    shutil.copytree(model, folder)
    tensors, parts = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in parts.items():
        if name.endswith(".lora_A.weight"):
            b = parts[name.replace(".lora_A.", ".lora_B.")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            tensors[weight] = tensors[weight] + ALPHA / RANK * b @ a
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_adapters(model: Path, folder: Path) -> tuple[list[Any], list[Path]]:
    """What asks for no adapter, and for two; and the checkpoint that each amounts to."""
    adapters = [make_adapter(folder / name, model, seed) for seed, name in enumerate(("one", "two"))]
    models = [merge_adapter(folder / f"{adapter.name}-merged", model, adapter) for adapter in adapters]
    return [None, *(LoRARequest(one.name, n, str(one)) for n, one in enumerate(adapters, 1))], [model, *models]


def ask(llm: LLM, adapters: list[Any], prompt: bool = True) -> list[Answer]:
    """Send one prompt with each adapter, in one batch, so that only the adapters can tell the answers apart.

    Returns:
        Of each: prompt and answer; log-probabilities of the answer, and before it of the prompt but for its first
        token if ``prompt``; and how many tokens were cached. Of a prompt they are computed anew, cached or not.
    """
    params = greedy(40, prompt_logprobs=0 if prompt else None, logprobs=0)
    prompts: list[Any] = [{"prompt_token_ids": PROMPT} for _ in adapters]
    found = []
    for out in llm.generate(prompts, params, lora_request=adapters, use_tqdm=False):
        tokens = PROMPT + list(out.outputs[0].token_ids)
        at: list[Any] = [*(out.prompt_logprobs or [])[1:], *(out.outputs[0].logprobs or [])]
        assert len(at) == (len(tokens) - 1 if prompt else 40)
        pairs = zip(at, tokens[-len(at) :], strict=True)
        likelihood = torch.tensor([one[token].logprob for one, token in pairs]).double()
        found.append((tokens, likelihood, out.num_cached_tokens or 0))
    return found


def apart_from(found: list[Answer], models: list[Path], of: Likelihood) -> torch.Tensor:
    """Compare answers with the formula, on the weights of each model.

    Returns:
        [3, 3] float64, the root mean square of the differences between the log-probabilities of a request's tokens
        and those that the formula gives with the weights of each: without an adapter, with the first, with the
        second. So what is right stands on the diagonal.
    """
    rows = [
        [rms(likelihood - of(model, tokens)[-len(likelihood) :]) for model in models]
        for tokens, likelihood, _ in found
    ]
    return torch.tensor(rows, dtype=torch.float64)


def check_adapters(llm: LLM, made: Made, folder: Path) -> torch.Tensor:
    """Ask decoders that evict tokens with two adapters and with none; answers and evictions are the formula's.

    Returns:
        What :func:`apart_from` does.
    """
    adapters, models = make_adapters(made.published, folder)
    decided: dict[Path, torch.Tensor] = {}

    def likelihood(model: Path, tokens: list[int]) -> torch.Tensor:
        logits, evicted = reference_logits(model, tokens, made.predictor, THRESHOLD, made.window)
        decided[model] = evicted[..., : len(PROMPT)]
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    apart = apart_from(ask(llm, adapters), models, likelihood)
    first, *others = (decided[model] for model in models)
    assert not any(torch.equal(first, other) for other in others)
    assert manager(llm).pool.released_total > 0
    assert_all_free(llm)
    return apart


def check_fox_adapters(llm: LLM, model: Path, folder: Path) -> torch.Tensor:
    """Ask a Forgetting Transformer with two adapters and with none; cached prefixes are of one adapter each.

    Returns:
        What :func:`apart_from` does, the worse of answers with a cached prefix and without.
    """
    adapters, models = make_adapters(model, folder)
    page = llm.llm_engine.vllm_config.cache_config.block_size
    whole = (len(PROMPT) - 1) // page * page
    # One alone, so that the others find its prefix in the cache, if they look for it.
    batches = [ask(llm, adapters[1:2], prompt=False), ask(llm, adapters, prompt=False), ask(llm, adapters)]
    assert [[cached for *_, cached in batch] for batch in batches] == [[0], [0, whole, 0], [0, 0, 0]]
    anew, cached = batches[2], ask(llm, adapters, prompt=False)
    assert [count for *_, count in cached] == [whole] * 3
    assert manager(llm).pool.released_total > 0
    assert_all_free(llm)

    def likelihood(merged: Path, tokens: list[int]) -> torch.Tensor:
        return fox_likelihood(merged, tokens, None)

    both = torch.stack([apart_from(found, models, likelihood) for found in (anew, cached)])
    return torch.where(torch.eye(3, dtype=torch.bool), both.amax(0), both.amin(0))
