"""Whether a linear layer may be computed without calling it."""

from __future__ import annotations

from types import MethodType

from torch import nn

PLAIN = nn.Linear.forward
"""What a plain layer computes."""
OF_TORCH = PLAIN.__module__ == "torch.nn.modules.linear"
"""Whether no library had replaced that when this module was imported."""


def is_plain(layer: nn.Module) -> bool:
    """Return whether nothing but its weight and bias decides what a layer computes: no hook, no other forward."""
    if not OF_TORCH or type(layer) is not nn.Linear or type(layer).forward is not PLAIN:
        return False
    own = layer.forward  # torch.compile notices if this changes
    if not isinstance(own, MethodType) or own.__func__ is not PLAIN or own.__self__ is not layer:
        return False
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return not any(hooks) and not nn.modules.module._has_any_global_hook()
