"""torch.compile for training."""

from __future__ import annotations

from typing import Any

from torch import nn


def compile_layers(model: nn.Module, **options: Any) -> None:
    """torch.compile of each layer by itself, in place: they are alike, so the first one's code serves all.

    A whole model is compiled layer after layer, which takes minutes.

    Args:
        model: any whose layers stand in a ModuleList.
        options: of :func:`torch.compile`.
    """
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            layer.compile(dynamic=False, **options)
