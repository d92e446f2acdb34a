"""A sum and its RMS norm in plain PyTorch, and their gradients."""

from __future__ import annotations

import torch


def forward(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add, and divide each row by the root of its mean square.

    Args:
        x: [N, n] floating numbers.
        delta: [N, n] what is added; None for nothing.
        weight: [n] factors of the normed columns.
        eps: added to the mean square.
        dtype: that of the normed rows.

    Returns:
        The sum [N, n], in the wider dtype of both; its normed rows [N, n]; and what they were multiplied with, [N]
        in float32 or wider.
    """
    total = x if delta is None else x + delta
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1) + eps)
    return total, (wide * inverse[:, None] * weight.to(wide.dtype)).to(dtype), inverse


def backward(
    total: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    grad_total: torch.Tensor,
    grad_normed: torch.Tensor,
    x_dtype: torch.dtype,
    delta_dtype: torch.dtype | None,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of what :func:`forward` took, in float32 or wider, each rounded once.

    Args:
        total, inverse: what it returned.
        weight: what it took.
        grad_total, grad_normed: gradients of the sum and of its normed rows.
        x_dtype: that of the gradient of ``x``.
        delta_dtype: that of a copy of it for ``delta``; None for no copy.
        with_weight: whether the weight has a gradient.

    Returns:
        The gradient of ``x`` [N, n], its copy [N, n] and the gradient of the weight [n] in the dtype of
        ``inverse``. Those that are not asked for have no elements.
    """
    unit = total.to(inverse.dtype) * inverse[:, None]
    weighted = grad_normed.to(inverse.dtype) * weight.to(inverse.dtype)
    along = (weighted * unit).mean(-1, keepdim=True)
    grad = grad_total.to(inverse.dtype) + inverse[:, None] * (weighted - unit * along)
    nothing = inverse.new_empty
    return (
        grad.to(x_dtype),
        nothing(0) if delta_dtype is None else grad.to(delta_dtype, copy=True),
        (grad_normed.to(inverse.dtype) * unit).sum(0) if with_weight else nothing(0),
    )
