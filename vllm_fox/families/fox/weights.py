"""Load a FoX checkpoint of either dialect into the vLLM model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import nn

from vllm_fox.modules.weights import TIED_HEAD, CheckpointLoader, Destination, heads_compared

from .architecture import OFFICIAL, Architecture, is_derived_weight

EMBEDDINGS = "model.embeddings.weight"
_GATES = ".attn.gate_proj."

# Name in the checkpoint (of either dialect), name in the model, and the part of a fused parameter that it fills.
_RENAMED: tuple[tuple[str, str, str | int | None], ...] = (
    (r"\.attn\.k_proj\.shift_proj\.", _GATES, "k_shift"),
    (r"\.attn\.v_proj\.shift_proj\.", _GATES, "v_shift"),
    (r"\.attn\.q_proj\.", ".attn.in_proj.", "q"),
    (r"\.attn\.k_proj\.(linear\.)?", ".attn.in_proj.", "k"),
    (r"\.attn\.v_proj\.(linear\.)?", ".attn.in_proj.", "v"),
    (r"\.attn\.(fgate|f)_proj\.", _GATES, "forget_gate"),
    (r"\.attn\.fgate_bias$", ".attn.forget_bias", None),
    (r"\.attn\.(ogate|g)_proj\.", ".attn.in_proj.", "output_gate"),
    (r"\.mlp\.gate_proj\.", ".mlp.gate_up_proj.", 0),
    (r"\.mlp\.up_proj\.", ".mlp.gate_up_proj.", 1),
)


class ArrangesHeads(Protocol):
    """What the loader needs of an attention module: see :class:`.model.ForgettingSelfAttention`."""

    def arrange_heads(self, gate: torch.Tensor | None, bias: torch.Tensor, input_norm: torch.Tensor | None) -> None:
        """Choose this rank's heads."""

    def arrange_output(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the output projection with its columns in the order of the ranks' heads."""


def parts_of(arch: Architecture) -> dict[str, list[str]]:
    """Return which of a checkpoint's projections each layer of the vLLM model computes that has several."""
    official = arch.dialect == OFFICIAL
    shifted = {"k": arch.k_shift, "v": arch.v_shift}
    inputs = ["q_proj", *(f"{name}_proj.linear" if shifted[name] else f"{name}_proj" for name in shifted)]
    if arch.output_gate is not None:
        inputs.append("ogate_proj" if official else "g_proj")
    return {"in_proj": inputs, "gate_up_proj": ["gate_proj"] if official else ["gate_proj", "up_proj"]}


def adapter_names(arch: Architecture) -> dict[str, str]:
    """Return how the ends of names of projections change between an adapter and vLLM's layers for adapters."""
    names = {f".{name}_proj.linear": f".{name}_proj" for name in "kv"}
    # This dialect has one tensor for what vLLM computes as one product.
    return names | ({".gate_proj": ".gate_up_proj"} if arch.dialect == OFFICIAL else {})


def layer_of(arch: Architecture, name: str) -> str:
    """Return which layer of the vLLM model a checkpoint's tensor goes into, if gates are a layer of their own."""
    return _renamed(arch, name)[0].rpartition(".")[0]


def load_checkpoint(
    loader: CheckpointLoader,
    model: nn.Module,
    arch: Architecture,
    attention: Mapping[int, ArrangesHeads],
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    gates_apart: bool,
    keep_order: bool,
) -> set[str]:
    """Fill the parameters of a Forgetting Transformer.

    The first load chooses the order of heads over ranks. Later ones keep it: any order is right, and the pages of
    running requests are in it.

    Args:
        loader: the model's loader.
        model: the vLLM model.
        arch: description that the model was built from.
        attention: the model's attention modules by layer.
        weights: names and tensors of the checkpoint, in any order.
        gates_apart: whether gates are a layer of their own.
        keep_order: whether heads stay in the checkpoint's order.

    Returns:
        Names of the parameters that were filled.

    Raises:
        ValueError: the tensors do not fit the model (see :meth:`CheckpointLoader.fill`).
    """
    update = loader.has_weights
    arranger = _Arranger(arch, attention, choose=not update and not keep_order)
    seen: set[str] = set()

    def destinations(name: str, tensor: torch.Tensor) -> Iterator[Destination]:
        seen.add(name)
        for ready_name, ready in arranger.arranged(name, tensor):
            for target, part, piece in _destinations(arch, ready_name, ready):
                yield target if gates_apart else target.replace(_GATES, ".attn.in_proj."), part, piece
        # vLLM takes a model for untied if its checkpoint holds the tied head as well. Updates come without that.
        if update and loader.head_is_embeddings and name == EMBEDDINGS and TIED_HEAD not in seen:
            yield TIED_HEAD, None, tensor

    def compared(equal: bool) -> None:
        loader.head_is_embeddings = equal

    weights = heads_compared(weights, EMBEDDINGS, TIED_HEAD, compared)
    given = (item for item in weights if not is_derived_weight(arch, item[0]))
    return loader.fill(model, given, destinations)


class _Arranger:
    """Holds back a layer's attention tensors until those that decide the order of its heads have been read.

    Args:
        choose: whether to choose an order; if not, the attention modules keep theirs.
    """

    def __init__(self, arch: Architecture, attention: Mapping[int, ArrangesHeads], choose: bool) -> None:
        gate = "fgate_proj" if arch.dialect == OFFICIAL else "f_proj"
        self._weight, self._bias, self._norm = f"attn.{gate}.weight", f"attn.{gate}.bias", "attn_norm.weight"
        self._deciding = {self._weight, self._bias, self._norm}
        if arch.gate != "full":
            self._bias = "attn.fgate_bias"
            self._deciding = {self._bias}
        # Without gates nothing is ever forgotten, so the order of heads does not matter.
        choose = choose and arch.gate != "none"
        self._waiting: dict[int, dict[str, torch.Tensor]] = {n: {} for n in attention} if choose else {}
        self._attention = attention

    def arranged(self, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Take one tensor of the checkpoint, and yield the tensors that can be filled in now."""
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
    """Yield the parameters that one checkpoint tensor fills."""
    target, part = _renamed(arch, name)
    yield target, part, tensor
    if arch.tied_embeddings and name == EMBEDDINGS:
        yield TIED_HEAD, None, tensor


def _renamed(arch: Architecture, name: str) -> tuple[str, str | int | None]:
    """Return a parameter's name in the model and the part of it that a checkpoint tensor fills."""
    for pattern, replacement, part in _RENAMED:
        target, found = re.subn(pattern, replacement, name)
        if found:
            # The official dialect has gate and up in one tensor, which vLLM splits.
            return target, None if arch.dialect == OFFICIAL and ".mlp." in name else part
    return name, None
