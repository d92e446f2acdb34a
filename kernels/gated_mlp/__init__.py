"""The product of a gated MLP, ``act(gate) * up``, in the backward pass: for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import library

from ..leaf import LazyKernel, use_triton
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


@library.custom_op("vllm_fox::gated_product_backward", mutates_args=())
def product_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.product_backward`."""
    if use_triton(grad.device) and grad.dtype != torch.float64:
        return _kernel.product_backward(grad, gate_up, activation)
    return reference.product_backward(grad, gate_up, activation)


@product_backward.register_fake
def _(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(grad.shape)


__all__ = ["product_backward"]
