"""Checkpoint tensors into the modules of a vLLM model; strict about what is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_fox.architecture import OFFICIAL, Architecture, expected_weights, is_derived_weight

if TYPE_CHECKING:
    from .fox import ForgettingSelfAttention

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


Destination = tuple[str, str | int | None, torch.Tensor]
"""A parameter's name, the part of it if several tensors share it, and what goes there."""


def load_checkpoint(
    model: nn.Module,
    arch: Architecture,
    attention: Mapping[int, ForgettingSelfAttention],
    weights: Iterable[tuple[str, torch.Tensor]],
) -> set[str]:
    """Fill the parameters of a Forgetting Transformer.

    Args:
        model: the vLLM model.
        arch: what it was built from.
        attention: its attention modules by layer.
        weights, returns, raises: as :func:`fill_parameters`.
    """
    arranger = _Arranger(arch, attention)

    def destinations(name: str, tensor: torch.Tensor) -> Iterator[Destination]:
        for ready_name, ready in arranger.arranged(name, tensor):
            yield from _destinations(arch, ready_name, ready)

    given = (item for item in weights if not is_derived_weight(arch, item[0]))
    return fill_parameters(model, expected_weights(arch), given, destinations, f"{arch.dialect} dialect")


def fill_parameters(
    model: nn.Module,
    expected: Mapping[str, tuple[int, ...]],
    weights: Iterable[tuple[str, torch.Tensor]],
    destinations: Callable[[str, torch.Tensor], Iterator[Destination]],
    kind: str,
) -> set[str]:
    """Fill a model's parameters.

    Args:
        model: the vLLM model.
        expected: names and shapes of a checkpoint's tensors.
        weights: names and tensors of the checkpoint, in any order.
        destinations: where a tensor goes.
        kind: of checkpoint, for errors.

    Returns:
        Names of the parameters that were filled: all that this pipeline stage has.

    Raises:
        ValueError: tensors are missing, unexpected, of a wrong shape or of a quantised dtype. One message
            names them (the first ten) with what was expected.
    """
    params = dict(model.named_parameters())
    missing, problems, filled = dict(expected), [], set()
    for name, tensor in weights:
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
        for target, part, piece in destinations(name, tensor):
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
            f"The checkpoint's weights do not fit its config.json ({kind}): "
            + "; ".join(problems[:_LISTED])
            + more
            + "."
        )
    return filled


class _Arranger:
    """Holds a layer's attention tensors back until those are there which decide on the order of its heads."""

    def __init__(self, arch: Architecture, attention: Mapping[int, ForgettingSelfAttention]) -> None:
        gate = "fgate_proj" if arch.dialect == OFFICIAL else "f_proj"
        self._weight, self._bias, self._norm = f"attn.{gate}.weight", f"attn.{gate}.bias", "attn_norm.weight"
        self._deciding = {self._weight, self._bias, self._norm}
        if arch.gate != "full":
            self._bias = "attn.fgate_bias"
            self._deciding = {self._bias}
        # Without gates nothing is ever forgotten, in whatever order.
        self._waiting: dict[int, dict[str, torch.Tensor]] = {n: {} for n in attention if arch.gate != "none"}
        self._attention = attention

    def arranged(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Takes a tensor of the checkpoint, gives those that can be filled in now."""
        found = re.fullmatch(r"model\.layers\.(\d+)\.(attn.*)", name)
        if not found or int(found[1]) not in self._attention:
            yield name, tensor
            return
        layer, attention = int(found[1]), self._attention[int(found[1])]
        ready = {found[2]: tensor}
        if layer in self._waiting:
            held = self._waiting[layer]
            held.update(ready)
            if not self._deciding <= held.keys():
                return
            attention.arrange_heads(held.get(self._weight), held[self._bias], held.get(self._norm))
            ready = self._waiting.pop(layer)
        for short, one in ready.items():
            if short == "attn.o_proj.weight":
                one = attention.arrange_output(one)
            yield f"model.layers.{layer}.{short}", one


def _destinations(arch: Architecture, name: str, tensor: torch.Tensor) -> Iterator[Destination]:
    """Parameters that one checkpoint tensor fills."""
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
