"""torch.compile for training."""

from __future__ import annotations

from typing import Any

from torch import nn

from .fused import heed_hooks


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile each layer of a model separately and in place, with torch.compile.

    The layers are alike, so the code of the first one serves all. If a whole model is compiled, every layer is
    compiled anew, which takes minutes. Code for the first length is followed by code for all others. A layer with a
    hook has code of its own, for which torch.compile's setting is changed in this process
    (:func:`~vllm_fox.hf.fused.heed_hooks`).

    Args:
        model: any model whose layers are in a ModuleList.
        options: options of :func:`torch.compile`.
    """
    heed_hooks()
    for layers in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for layer in layers:
            layer.compile(**options)
