"""A sum and its RMS norm, of which a compiled training step computes the gradients by one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import library

from ..leaf import LazyKernel, use_triton
from . import reference

if TYPE_CHECKING:
    from . import kernel as _kernel
else:
    _kernel = LazyKernel(__name__)


@library.custom_op("vllm_fox::add_rms_norm_backward", mutates_args=())
def _backward(
    total: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    grad_total: torch.Tensor,
    grad_normed: torch.Tensor,
    x_dtype: torch.dtype,
    delta_dtype: torch.dtype | None,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`."""
    backward = reference.backward
    if use_triton(total.device) and inverse.dtype != torch.float64:
        backward = _kernel.backward
    total, inverse, weight, grad_total, grad_normed = (
        x.contiguous() for x in (total, inverse, weight, grad_total, grad_normed)
    )
    return backward(total, inverse, weight, grad_total, grad_normed, x_dtype, delta_dtype, with_weight)


@_backward.register_fake
def _(
    total: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    grad_total: torch.Tensor,
    grad_normed: torch.Tensor,
    x_dtype: torch.dtype,
    delta_dtype: torch.dtype | None,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        total.new_empty((0,) if delta_dtype is None else total.shape, dtype=delta_dtype or inverse.dtype),
        inverse.new_empty(weight.shape if with_weight else (0,)),
    )


class _AddRMSNorm(torch.autograd.Function):
    """The forward pass is plain PyTorch, which torch.compile fuses; the backward pass is one operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
        with_weight: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, normed, inverse = reference.forward(x, delta, weight, eps, dtype)
        ctx.save_for_backward(total, inverse, weight)
        ctx.x_dtype, ctx.delta_dtype = x.dtype, None if delta is None else delta.dtype
        ctx.with_weight = with_weight
        # While torch.compile of PyTorch 2.11 traces, all that was computed is an output. A cast that changes
        # nothing returns the tensor that it was given. Were that an output twice, a gradient would be lost.
        return total.view_as(total), normed.view_as(normed)

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, grad_normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, inverse, weight = ctx.saved_tensors
        copy = None if ctx.delta_dtype == ctx.x_dtype else ctx.delta_dtype
        grad_x, grad_delta, grad_weight = _backward(
            total, inverse, weight, grad_total, grad_normed, ctx.x_dtype, copy, ctx.with_weight
        )
        if copy is None:
            grad_delta = None if ctx.delta_dtype is None else grad_x
        grad_weight = grad_weight.to(weight.dtype) if ctx.with_weight else None
        return grad_x, grad_delta, grad_weight, None, None, None


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add to the residual stream and norm the sum, for training steps that torch.compile traces.

    It is differentiable once, in ``x``, ``delta`` and ``weight``. For this, the sum and a number for each row are
    kept.

    Args:
        x: [N, n] floating numbers.
        delta: [N, n] what a layer adds; None for nothing.
        weight: [n] factors of the normed columns.
        eps: added to the mean square.
        dtype: that of the normed rows, to which they are rounded once from float32 or wider.

    Returns:
        The sum [N, n], in the wider dtype of both, and its normed rows [N, n].
    """
    both: tuple[torch.Tensor, torch.Tensor]
    both = _AddRMSNorm.apply(x, delta, weight, eps, dtype, weight.requires_grad)  # type: ignore[no-untyped-call]
    return both


__all__ = ["add_rms_norm"]
