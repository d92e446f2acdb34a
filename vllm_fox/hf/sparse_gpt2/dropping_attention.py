"""Attention that learns which tokens to drop, for training: a block of queries at a time, forward and backward.

I_kj is the share of key j that is kept at query k. It is a product over the queries in between, so log I is a
running sum over queries, which each block continues from the block before. The backward pass needs nothing of size
[T, T] but the log I that layers pass to those above them, if they do: one float for each pair of tokens, whatever
the number of heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from . import dropping_steps
from .alpha_sigmoid import SoftStep

ROWS = {"cpu": 64, "cuda": 1024}
"""Queries whose weights are in memory at once: so many fit a core's cache, or keep a GPU busier than its host."""
FUSED = {"cpu": False, "cuda": True}
"""Whether torch.compile fuses the steps between matrix products in training. That takes half a minute once."""


# torch.compile must not look inside: it would trace every block of a long text, which takes minutes.
@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def dropping_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_int: torch.Tensor,
    k_int: torch.Tensor,
    bias: torch.Tensor,
    before: torch.Tensor | None,
    alpha: float | SoftStep,
    *,
    hand_on: bool = True,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute causal attention ``softmax(q k^T / sqrt(d) + log I + before) v`` in the dtypes of the arguments.

    I is that of DCP (arXiv 2305.15805):

        I_kj = product over j < n <= k of alpha_sigmoid(q_int_n . k_int_j / sqrt(r) + bias).

    Args:
        q, k, v: [B, H, T, d].
        q_int, k_int: [B, T, r] float32 or wider.
        bias: [1] bias of the interaction scores.
        before: [B, T, T] sum of log I of the layers below, or None. Only the values under the diagonal are read.
        alpha: alpha of the alpha-sigmoid, or its table in float32; infinity drops tokens altogether.
        hand_on: whether log I is returned.
        rows: queries of a block; :data:`ROWS` unless given.

    Returns:
        out [B, H, T, d]; log I + before [B, T, T], with arbitrary values above the diagonal, or None; and the mean
        of I over all queries but the last and all T keys, where keys that a query cannot see count as 1. All are
        differentiable.
    """
    with torch.autocast(q.device.type, enabled=False):
        result: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor] = _DroppingAttention.apply(
            q, k, v, q_int, k_int, bias, before, alpha, hand_on, rows or ROWS[q.device.type]
        )
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def ragged_dropping_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_int: torch.Tensor,
    k_int: torch.Tensor,
    bias: torch.Tensor,
    before: torch.Tensor | None,
    alpha: float | SoftStep,
    *,
    lengths: list[int],
    hand_on: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Compute :func:`dropping_attention` of sequences that stand one after the other in one row (B = 1).

    Args:
        before: [P], the sequences' matrices, flattened and one after the other; P is the sum of the squares of
            ``lengths``.
        lengths: number of tokens of each sequence, at least 1.

    Returns:
        out [1, H, T, d]; log I + before [P], or None; and the mean of I, in which each sequence counts by the pairs
        of its queries but the last with its keys.
    """
    squares = [n * n for n in lengths]
    below = [None] * len(lengths) if before is None else before.split(squares)
    parts = zip(*(x.split(lengths, dim=-2) for x in (q, k, v, q_int, k_int)), below, lengths, strict=True)
    outs, logs, kept = [], [], []
    for *tensors, one, n in parts:
        given = None if one is None else one.view(1, n, n)
        out, own, share = dropping_attention(*tensors, bias, given, alpha, hand_on=hand_on)
        outs.append(out)
        kept.append(share * (n * (n - 1)))
        if own is not None:
            logs.append(own.flatten())
    mean = torch.stack(kept).sum() / max(1, sum(n * (n - 1) for n in lengths))
    return torch.cat(outs, dim=-2), torch.cat(logs) if logs else None, mean


class _DroppingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_int: torch.Tensor,
        k_int: torch.Tensor,
        bias: torch.Tensor,
        before: torch.Tensor | None,
        alpha: float | SoftStep,
        hand_on: bool,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        batch, _, length, _ = q.shape
        steps = _steps(q, alpha)
        out = torch.empty_like(q)
        logs = q_int.new_zeros(batch, length, length) if hand_on else None
        lse = q_int.new_empty(q.shape[:3])
        carry = q_int.new_zeros(batch, length)
        kept = q_int.new_zeros(())
        carries = []
        for block in _blocks(length, rows):
            keys = slice(0, block.stop)
            carries.append(carry)
            own, _ = _own_logs(steps, q_int, k_int, bias, carry, block, alpha, slope=False)
            carry = torch.cat((own[:, -1], carry[:, block.stop :]), dim=1)
            counted = min(block.stop, length - 1) - block.start
            # Keys after the block, which it cannot see, count as 1.
            kept += steps.amount(own[:, :counted]) + batch * counted * (length - block.stop)
            total = own if before is None else own + before[:, block, keys]
            if logs is not None:
                logs[:, block, keys] = total
            products = _products(q[:, :, block], k[:, :, keys])
            weights, mass, lse[:, :, block] = steps.weights(products, total, q.shape[3], v.dtype)
            out[:, :, block] = weights @ v[:, :, keys] / mass
        kept /= max(1, batch * (length - 1) * length)
        ctx.save_for_backward(q, k, v, q_int, k_int, bias, before, lse, *carries)
        ctx.set_materialize_grads(False)
        ctx.alpha, ctx.rows = alpha, rows
        return out, logs, kept

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any,
        grad_out: torch.Tensor | None,
        grad_logs: torch.Tensor | None,
        grad_kept: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, q_int, k_int, bias, before, lse, *carries = ctx.saved_tensors
        batch, _, length, dim = q.shape
        steps = _steps(q, ctx.alpha)
        grad_out = torch.zeros_like(q) if grad_out is None else grad_out
        grad_q = torch.zeros_like(q)
        # Sums over blocks are in float32 or wider: in bfloat16, what one block adds to a sum of many is lost.
        summed = (k, v, q_int, k_int, bias)
        sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in summed]
        grad_k, grad_v, grad_q_int, grad_k_int, grad_bias = sums
        share = lse.new_zeros(()) if grad_kept is None else grad_kept / max(1, batch * (length - 1) * length)
        grad_before = None if before is None else torch.zeros_like(before)
        # Gradient that the queries after the block pass back to the running sum of each key.
        later = q_int.new_zeros(batch, length)
        for block, carry in zip(reversed(_blocks(length, ctx.rows)), reversed(carries), strict=True):
            keys = slice(0, block.stop)
            own, slope = _own_logs(steps, q_int, k_int, bias, carry, block, ctx.alpha, slope=True)
            total = own if before is None else own + before[:, block, keys]
            products = _products(q[:, :, block], k[:, :, keys])
            grad = grad_out[:, :, block]
            passed = _products(grad, v[:, :, keys])
            weights, grad_products, down = steps.weights_gradients(
                products, total, lse[:, :, block], passed, dim, q.dtype
            )
            grad_v[:, :, keys] += weights.transpose(2, 3) @ grad
            grad_q[:, :, block] = grad_products @ k[:, :, keys]
            grad_k[:, :, keys] += grad_products.transpose(2, 3) @ q[:, :, block]
            if grad_logs is not None:
                down = down + grad_logs[:, block, keys]
            if grad_before is not None:
                grad_before[:, block, keys] = down
            counted = min(block.stop, length - 1) - block.start
            grad_own = steps.own_gradients(down, own, share, counted)
            # The gradient of a sum over queries up to k is the sum of the gradients from k on.
            grad_sums, behind = dropping_steps.sums(grad_own, later[:, keys], reverse=True)
            later[:, keys] = grad_sums[:, 0, 0] + behind[:, 0]
            grad_scores = steps.scores_gradients(grad_sums, behind, slope)
            grad_bias += grad_scores.sum()
            grad_scores *= q_int.shape[2] ** -0.5
            grad_q_int[:, block] = grad_scores @ k_int[:, keys]
            grad_k_int[:, keys] += grad_scores.transpose(1, 2) @ q_int[:, block]
        rounded = (grad.to(x.dtype) for grad, x in zip(sums, summed, strict=True))
        return grad_q, *rounded, grad_before, *[None] * 3


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``x y^T`` of x [B, H, n, d] and y [B, H, m, d], in float32 or wider.

    The sums are float32 anyway. Rounding them to bfloat16 would cause all the error that log I's gradients have.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == wide or x.device.type != "cuda":
        return x.to(wide) @ y.to(wide).transpose(2, 3)
    flat = torch.bmm(x.flatten(0, 1), y.flatten(0, 1).transpose(1, 2), out_dtype=wide)
    return flat.unflatten(0, x.shape[:2])


def _steps(q: torch.Tensor, alpha: float | SoftStep) -> Any:
    fused = FUSED[q.device.type] and isinstance(alpha, SoftStep)
    return dropping_steps.fused() if fused else dropping_steps


def _blocks(length: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _own_logs(
    steps: Any,
    q_int: torch.Tensor,
    k_int: torch.Tensor,
    bias: torch.Tensor,
    carry: torch.Tensor,
    block: slice,
    alpha: float | SoftStep,
    slope: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log I of a block of queries and the keys up to its end [B, rows, keys], and the slope of its terms.

    ``carry`` [B, T] is log I of the query before the block, 0 for keys after that query. The slope, of the log that
    each pair of tokens adds, is None unless ``slope`` is set.
    """
    keys = slice(0, block.stop)
    products = q_int[:, block] @ k_int[:, keys].transpose(1, 2)
    logs, found = steps.decide(products, bias, q_int.shape[2], alpha, slope)
    own = steps.run_on(*dropping_steps.sums(logs, carry[:, keys]), alpha == math.inf)
    return own, found
