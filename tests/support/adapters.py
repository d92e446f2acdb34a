"""LoRA adapters as PEFT saves them, and checkpoints with an adapter merged into their weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM
from vllm.lora.request import LoRARequest

from benchmarks.engines import assert_all_free, greedy, manager
from tests.support.evicting import THRESHOLD, Made
from tests.support.reference_evicting import reference_logits

RANK, ALPHA = 4, 8.0
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Write an adapter of all projections of a checkpoint, with random numbers large enough to change its text."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        layer, _, last = name.rpartition(".")
        if last == "weight" and layer.endswith(PROJECTIONS):
            rows, columns = weight.shape
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw) * 0.1
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, "bias": "none"}
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


def check_adapters(llm: LLM, made: Made, folder: Path) -> torch.Tensor:
    """Ask with two adapters and with none in one batch; compare with the formula, on merged weights.

    The three requests have one prompt, so only the adapters can tell their answers and evictions apart.

    Returns:
        [3, 3] float64, the root mean square of the differences between the log-probabilities of a request's tokens
        and those that the formula gives with the weights of each: without an adapter, with the first, with the
        second. So what is right stands on the diagonal.
    """
    adapters = [make_adapter(folder / name, made.published, seed) for seed, name in enumerate(("one", "two"))]
    models = [made.published]
    models += [merge_adapter(folder / f"{adapter.name}-merged", made.published, adapter) for adapter in adapters]
    asked: list[Any] = [None]
    asked += [LoRARequest(adapter.name, n, str(adapter)) for n, adapter in enumerate(adapters, 1)]
    prompt = torch.randint(1, 257, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts: list[Any] = [{"prompt_token_ids": prompt} for _ in asked]
    params = greedy(40, prompt_logprobs=0, logprobs=0)
    outs = llm.generate(prompts, params, lora_request=asked, use_tqdm=False)
    apart, decided = torch.empty(3, 3, dtype=torch.float64), []
    for row, out in enumerate(outs):
        tokens = prompt + list(out.outputs[0].token_ids)
        assert out.prompt_logprobs is not None and out.outputs[0].logprobs is not None
        at: list[Any] = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
        found = torch.tensor([one[token].logprob for one, token in zip(at, tokens[1:], strict=True)]).double()
        for column, model in enumerate(models):
            logits, evicted = reference_logits(model, tokens, made.predictor, THRESHOLD, made.window)
            want = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            apart[row, column] = (found - want).square().mean().sqrt()
            if row == column:
                decided.append(evicted[..., : len(prompt)])
    assert not any(torch.equal(decided[0], other) for other in decided[1:])
    assert manager(llm).pool.released_total > 0
    assert_all_free(llm)
    return apart
