"""How far the gradients of a trained model on real text are from float32's."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_fox.hf import ForgettingTransformerForCausalLM, compile_layers

ROUNDINGS = 30
"""That a number goes through in a layer, one after the other: some ten forward, and for the two factors of each
gradient the same again."""
CANCELLING = 4.0
"""By how much more than all gradients together one parameter's may be off: it may be a sum of tokens' parts that
cancel, and whose errors do not."""


def bound(layers: int, dtype: torch.dtype) -> float:
    """Root of as many independent roundings as there are on the way, each with a deviation of u / sqrt(3)."""
    return math.sqrt(layers * ROUNDINGS / 3) * torch.finfo(dtype).eps / 2


def real_tokens(checkpoint: Path, count: int) -> torch.Tensor:
    """[count] of Python source, as the shipped model was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    source = "".join(inspect.getsource(module) for module in (argparse, inspect, contextlib))
    ids = torch.tensor(tokenizer(source, verbose=False)["input_ids"])
    return ids.repeat(-(-count // len(ids)))[:count]


def assert_near_float32(
    checkpoint: Path,
    ids: torch.Tensor,
    *,
    weights: torch.dtype = torch.float32,
    compiled: bool = False,
    **arguments: Any,
) -> None:
    """Gradients of the loss on windows [B, T] in bfloat16 against those in float32, together and one by one.

    Args:
        weights: dtype of the weights; float32 ones train under autocast.
        arguments: of the model.
    """
    device = ids.device.type

    def gradients(dtype: torch.dtype, exact: bool) -> dict[str, torch.Tensor]:
        model: Any = ForgettingTransformerForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        model.to(device).train()
        if compiled and not exact:
            compile_layers(model)
        plain = exact or dtype == torch.bfloat16
        with contextlib.nullcontext() if plain else torch.autocast(device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False, **arguments).loss
        loss.backward()
        return {name: weight.grad.double() for name, weight in model.named_parameters()}

    found, want = gradients(weights, False), gradients(torch.float32, True)
    layers = sum(name.endswith("attn.o_proj.weight") for name in want)
    allowed = bound(layers, torch.bfloat16)
    errors = {name: (found[name] - x).norm() for name, x in want.items()}
    each = {name: (errors[name] / x.norm()).item() for name, x in want.items()}
    together = torch.stack(list(errors.values())).norm() / torch.stack([x.norm() for x in want.values()]).norm()
    worst = max(each, key=lambda name: each[name])
    print(
        f"{together:.4f} together, {worst} {each[worst]:.4f}, allowed {allowed:.4f} and {CANCELLING * allowed:.4f}"
    )
    assert together <= allowed
    assert each[worst] <= CANCELLING * allowed, worst
