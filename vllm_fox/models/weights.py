"""From a checkpoint's tensor names, in either dialect, to the modules of the vLLM model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_fox.architecture import Architecture

SHOWN = 10
"""Names listed in an error about weights."""

# Checkpoint name -> (module name, shard of a fused module).
_PLACES: dict[str, tuple[str, str | int | None]] = {
    "attn.q_proj": ("attn.qkv_proj", "q"),
    "attn.k_proj": ("attn.qkv_proj", "k"),
    "attn.k_proj.linear": ("attn.qkv_proj", "k"),
    "attn.k_proj.shift_proj": ("attn.k_shift_proj", None),
    "attn.v_proj": ("attn.qkv_proj", "v"),
    "attn.v_proj.linear": ("attn.qkv_proj", "v"),
    "attn.v_proj.shift_proj": ("attn.v_shift_proj", None),
    "attn.f_proj": ("attn.gate_proj", None),
    "attn.fgate_proj": ("attn.gate_proj", None),
    "attn.g_proj": ("attn.output_gate_proj", None),
    "attn.ogate_proj": ("attn.output_gate_proj", None),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
}


def load_weights(
    model: nn.Module, architecture: Architecture, weights: Iterable[tuple[str, torch.Tensor]]
) -> set[str]:
    """Load every tensor of a checkpoint into ``model``.

    Returns:
        Names of the parameters loaded.

    Raises:
        ValueError: a tensor is missing, unexpected or of a wrong shape; names each and what was expected.
    """
    expected = architecture.weights()
    parameters = dict(model.named_parameters())
    problems: list[str] = []
    seen: set[str] = set()
    loaded: set[str] = set()
    for name, tensor in weights:
        if _ignored(name, architecture):
            continue
        if name not in expected:
            problems.append(f"unexpected tensor {name} {list(tensor.shape)}")
            continue
        seen.add(name)
        if tuple(tensor.shape) != expected[name]:
            problems.append(
                f"tensor {name} has shape {list(tensor.shape)}, expected {list(expected[name])} by config.json"
            )
            continue
        for target, shard, piece in _place(name, tensor, architecture):
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            if shard is None:
                loader(parameter, piece)
            else:
                loader(parameter, piece, shard)
            loaded.add(target)
    problems += [f"missing tensor {name}, expected {list(expected[name])}" for name in expected if name not in seen]
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError("The checkpoint does not fit its config.json: " + "; ".join(problems[:SHOWN]) + rest)
    return loaded


def _ignored(name: str, architecture: Architecture) -> bool:
    if name.endswith("rotary.inv_freq"):  # recomputed from rope_base
        return True
    return name == "lm_head.weight" and architecture.tied_embeddings


def _place(
    name: str, tensor: torch.Tensor, architecture: Architecture
) -> Iterator[tuple[str, str | int | None, torch.Tensor]]:
    """Parameter name, shard and tensor for a checkpoint's tensor."""
    module, _, kind = name.rpartition(".")
    if kind == "fgate_bias":
        yield name, None, tensor
        return
    head, _, tail = module.rpartition(".attn.") if ".attn." in module else module.rpartition(".mlp.")
    local = ("attn." if ".attn." in module else "mlp.") + tail
    if not head or local not in _PLACES:
        yield name, None, tensor
        return
    place, shard = _PLACES[local]
    target = f"{head}.{place}.{kind}"
    if shard == 0 and architecture.dialect == "official":
        # One tensor holds gate, then up.
        for half, piece in enumerate(tensor.chunk(2)):
            yield target, half, piece
        return
    yield target, shard, tensor
