"""Whether a layer may be computed without calling it."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TypeGuard

from torch import nn

PLAIN = nn.Linear.forward
"""What a plain layer computes."""
OF_TORCH = PLAIN.__module__ == "torch.nn.modules.linear"
"""Whether no library had replaced that when this module was imported."""


def is_plain(layer: nn.Module) -> bool:
    """Return whether nothing but its weight and bias decides what a linear layer computes."""
    return OF_TORCH and computes(layer, nn.Linear, PLAIN)


def computes(layer: nn.Module, kind: type[nn.Module], forward: Callable[..., object]) -> bool:
    """Return whether calling a layer computes ``forward``, that of its kind: no hook, no other forward or class."""
    if type(layer) is not kind or type(layer).forward is not forward:
        return False
    own = layer.forward  # torch.compile notices if this changes
    if not isinstance(own, MethodType) or own.__func__ is not forward or own.__self__ is not layer:
        return False
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return not any(hooks) and not nn.modules.module._has_any_global_hook()


def is_trained_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer need not be called, and its weights are being trained."""
    # The weights of a layer that is sharded by itself are of another type.
    return (
        isinstance(layer, nn.Linear)
        and layer.training
        and type(layer.weight) is nn.Parameter
        and layer.weight.requires_grad
        and is_plain(layer)
    )
