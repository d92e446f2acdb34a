"""torch.compile for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile each layer of a model separately and in place, with torch.compile.

    The layers are alike, so the code of the first one serves all. If a whole model is compiled, every layer is
    compiled anew, which takes minutes. Code for the first length is followed by code for all others. From then on
    torch.compile looks for hooks in every call in this process, and not only while it traces the first layer: a
    layer with a hook has code of its own.

    Args:
        model: any model whose layers are in a ModuleList.
        options: options of :func:`torch.compile`.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            layer.compile(**options)
