"""The second half of a gated MLP: the product of gate and up, and the projection of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_fox.kernels.gated_mlp import product_backward

from .autocast import for_projections
from .fused import traced_with_gradients
from .plain import is_trained_plain


def gated(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return ``act(gate) * up``, computed in float32 or wider and rounded once."""
    wide = gate.to(torch.promote_types(gate.dtype, torch.float32))
    act = F.silu(wide) if activation == "silu" else wide.sigmoid()
    return (act * up).to(up.dtype)


def can_project(gate_up: torch.Tensor, down: nn.Module) -> bool:
    """Return whether :func:`projected` may stand for a call of ``down``.

    It may while torch.compile traces a training step, if ``down`` is a plain layer without a bias, of whose weight
    and input the gradients are asked.
    """
    if not traced_with_gradients() or not is_trained_plain(down) or down.bias is not None:
        return False
    fits = gate_up.shape[-1] == 2 * down.weight.shape[1] and gate_up.dtype == for_projections(down.weight).dtype
    return fits and gate_up.requires_grad


def projected(gate_up: torch.Tensor, down: nn.Linear, activation: str) -> torch.Tensor:
    """Return ``down(act(gate) * up)`` [..., out].

    The product is not kept for the backward pass, where one kernel makes it again and the gradients of gate and up
    besides. torch.compile by itself would make two, which would both read gate and up.

    Args:
        gate_up: [..., 2 I] the gate, and then up.
        down: for which :func:`can_project`.
        activation: "silu" or "sigmoid".
    """
    out: torch.Tensor = _Projected.apply(gate_up.flatten(0, -2), for_projections(down.weight), activation)
    return out.unflatten(0, gate_up.shape[:-1])


class _Projected(torch.autograd.Function):
    """``act(gate) * up`` times a weight [out, I], given gate and up [N, 2 I] in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
        ctx.save_for_backward(gate_up, weight)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, -1)
        return F.linear(gated(gate, up, activation), weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        gate_up, weight = ctx.saved_tensors
        grad_gate_up, product = product_backward(grad @ weight, gate_up, ctx.activation)
        return grad_gate_up, grad.T @ product, None
