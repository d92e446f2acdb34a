"""Checkpoint tensors of both dialects into the modules of the vLLM model; strict about what is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_fox.architecture import OFFICIAL, Architecture, expected_weights, is_derived_weight

_LISTED = 10
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Name in the checkpoint (either dialect) to name in the model, and the part of a fused parameter it fills.
_RENAMED: tuple[tuple[str, str, str | int | None], ...] = (
    (r"\.attn\.k_proj\.shift_proj\.", ".attn.in_proj.", "k_shift"),
    (r"\.attn\.v_proj\.shift_proj\.", ".attn.in_proj.", "v_shift"),
    (r"\.attn\.q_proj\.", ".attn.in_proj.", "q"),
    (r"\.attn\.k_proj\.(linear\.)?", ".attn.in_proj.", "k"),
    (r"\.attn\.v_proj\.(linear\.)?", ".attn.in_proj.", "v"),
    (r"\.attn\.(fgate|f)_proj\.", ".attn.in_proj.", "forget_gate"),
    (r"\.attn\.fgate_bias$", ".attn.forget_bias", None),
    (r"\.attn\.(ogate|g)_proj\.", ".attn.in_proj.", "output_gate"),
    (r"\.mlp\.gate_proj\.", ".mlp.gate_up_proj.", 0),
    (r"\.mlp\.up_proj\.", ".mlp.gate_up_proj.", 1),
)


def load_checkpoint(model: nn.Module, arch: Architecture, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Fill the model's parameters.

    Args:
        model: the vLLM model.
        arch: what it was built from.
        weights: names and tensors of the checkpoint, in any order.

    Returns:
        Names of the parameters that were filled: all that this pipeline stage has.

    Raises:
        ValueError: tensors are missing, unexpected, of a wrong shape or of a quantised dtype. One message
            names them (the first ten) with what was expected.
    """
    expected = expected_weights(arch)
    params = dict(model.named_parameters())
    missing, problems, filled = dict(expected), [], set()
    for name, tensor in weights:
        if is_derived_weight(arch, name):
            continue
        if name not in expected:
            problems.append(f"unexpected tensor {name} {list(tensor.shape)}")
            continue
        missing.pop(name, None)
        if tuple(tensor.shape) != expected[name]:
            problems.append(f"tensor {name} is {list(tensor.shape)}, expected {list(expected[name])}")
            continue
        if tensor.dtype not in _DTYPES:
            problems.append(f"tensor {name} is {tensor.dtype}, expected float16, bfloat16 or float32")
            continue
        for target, part, piece in _destinations(arch, name, tensor):
            if is_pp_missing_parameter(target, model):
                continue  # another pipeline stage's
            param = params[target]
            loader: Callable[..., None] = getattr(param, "weight_loader", default_weight_loader)
            loader(param, piece) if part is None else loader(param, piece, part)
            filled.add(target)
    problems += [f"missing tensor {name}, expected {list(shape)}" for name, shape in missing.items()]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"The checkpoint's weights do not fit its config.json ({arch.dialect} dialect): "
            + "; ".join(problems[:_LISTED])
            + more
            + "."
        )
    return filled


def _destinations(
    arch: Architecture, name: str, tensor: torch.Tensor
) -> Iterator[tuple[str, str | int | None, torch.Tensor]]:
    """Parameters that one checkpoint tensor fills: (name, part of a fused parameter, tensor)."""
    target, part = name, None
    for pattern, replacement, shard in _RENAMED:
        target, found = re.subn(pattern, replacement, name)
        if found:
            part = shard
            break
    if arch.dialect == OFFICIAL and ".mlp.gate_proj." in name:
        gate, up = tensor.chunk(2)  # both in one tensor in this dialect
        yield target, 0, gate
        yield target, 1, up
    else:
        yield target, part, tensor
