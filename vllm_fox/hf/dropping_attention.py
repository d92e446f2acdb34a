"""Attention that learns which tokens to drop, for training: a block of queries at a time, forward and backward.

What is kept of key j at query k is I_kj, a product over the queries in between, so log I is a running sum over
queries that blocks can hand on. Nothing of size [T, T] is kept for the backward pass but what layers hand to those
above them, one float for each pair of tokens, whatever the number of heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .alpha_sigmoid import SoftStep, log_alpha_sigmoid

ROWS = {"cpu": 64, "cuda": 256}
"""Queries whose weights are in memory at once: what fits a core's cache, or fills a GPU."""
FLOOR = -85.0
"""Least log I in training: a gradient can still come from a token that is as good as dropped."""


def dropping_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_int: torch.Tensor,
    k_int: torch.Tensor,
    bias: torch.Tensor,
    before: torch.Tensor | None,
    alpha: float | SoftStep,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``softmax(q k^T / sqrt(d) + log I + before) v``, causal, with DCP's I (arXiv 2305.15805),

        I_kj = product over j < n <= k of alpha_sigmoid(q_int_n . k_int_j / sqrt(r) + bias).

    Args:
        q, k, v: [B, H, T, d].
        q_int, k_int: [B, T, r] float32 or wider.
        bias: [1].
        before: [B, T, T] log I of layers below, summed, or None. Only what is under the diagonal is read.
        alpha: of the alpha-sigmoid, or its table in float32; infinity drops tokens altogether.
        rows: queries of a block; :data:`ROWS` unless given.

    Returns:
        out [B, H, T, d]; log I + before [B, T, T], of any value above the diagonal; and the mean of I over all
        queries but the last and all T keys, those that a query cannot see counting as 1. All are differentiable.
    """
    # torch.compile follows tensors into an autograd function only where they are arguments of their own.
    exact, soft = (None, alpha) if isinstance(alpha, SoftStep) else (alpha, (None, None, None))
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _DroppingAttention.apply(
        q, k, v, q_int, k_int, bias, before, rows or ROWS[q.device.type], exact, *soft
    )
    return result


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
        rows: int,
        exact: float | None,
        *soft: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, _, length, dim = q.shape
        alpha = SoftStep(*soft) if exact is None else exact
        out = torch.empty_like(q)
        logs = q_int.new_zeros(batch, length, length)
        lse = q_int.new_empty(q.shape[:3])
        carry = q_int.new_zeros(batch, length)
        kept = q_int.new_zeros(())
        carries = []
        for block in _blocks(length, rows):
            carries.append(carry)
            own, _ = _own_logs(q_int, k_int, bias, carry, block, alpha)
            carry = torch.cat((own[:, -1], carry[:, block.stop :]), dim=1)
            counted = min(block.stop, length - 1) - block.start
            # Keys behind the block, which it cannot see, count as 1.
            kept += own[:, :counted].exp().sum() + batch * counted * (length - block.stop)
            total = own if before is None else own + before[:, block, : block.stop]
            logs[:, block, : block.stop] = total
            logits = _logits(q, k, total, block, dim)
            peak = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            mass = weights.sum(-1, keepdim=True)
            lse[:, :, block] = (peak + mass.log())[..., 0]
            out[:, :, block] = weights.to(v.dtype) @ v[:, :, : block.stop] / mass
        kept /= max(1, batch * (length - 1) * length)
        ctx.save_for_backward(q, k, v, q_int, k_int, bias, before, out, lse, *soft, *carries)
        ctx.exact, ctx.rows = exact, rows
        return out, logs, kept

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_out: torch.Tensor, grad_logs: torch.Tensor, grad_kept: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, q_int, k_int, bias, before, out, lse, table, scale, power, *carries = ctx.saved_tensors
        alpha = SoftStep(table, scale, power) if ctx.exact is None else ctx.exact
        batch, _, length, dim = q.shape
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        grad_q_int, grad_k_int, grad_bias = (torch.zeros_like(x) for x in (q_int, k_int, bias))
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
        share = grad_kept / max(1, batch * (length - 1) * length)
        grad_before = grad_logs.clone()
        # From queries behind the block: what they pass back to the running sum by key.
        later = q_int.new_zeros(batch, length)
        for block, carry in zip(reversed(_blocks(length, ctx.rows)), reversed(carries), strict=True):
            keys = slice(0, block.stop)
            own, slope = _own_logs(q_int, k_int, bias, carry, block, alpha)
            total = own if before is None else own + before[:, block, keys]
            weights = _logits(q, k, total, block, dim).sub_(lse[:, :, block, None]).exp_()
            grad = grad_out[:, :, block]
            grad_v[:, :, keys] += weights.to(v.dtype).transpose(2, 3) @ grad
            grad_logits = weights * ((grad @ v[:, :, keys].transpose(2, 3)).to(lse.dtype) - delta[:, :, block])
            down = grad_before[:, block, keys]
            down += grad_logits.sum(1)
            grad_logits = (grad_logits * dim**-0.5).to(q.dtype)
            grad_q[:, :, block] = grad_logits @ k[:, :, keys]
            grad_k[:, :, keys] += grad_logits.transpose(2, 3) @ q[:, :, block]
            grad_own = down.clone()
            counted = min(block.stop, length - 1) - block.start
            grad_own[:, :counted] += share * own[:, :counted].exp()
            grad_own.masked_fill_(own <= FLOOR, 0.0)
            # Of a sum over queries up to k: everything from k on.
            grad_own = _up_to(grad_own).T @ grad_own + later[:, None, keys]
            later[:, keys] = grad_own[:, 0]
            grad_scores = grad_own * slope
            grad_bias += grad_scores.sum()
            grad_scores *= q_int.shape[2] ** -0.5
            grad_q_int[:, block] = grad_scores @ k_int[:, keys]
            grad_k_int[:, keys] += grad_scores.transpose(1, 2) @ q_int[:, block]
        given = None if before is None else grad_before
        return grad_q, grad_k, grad_v, grad_q_int, grad_k_int, grad_bias, given, *[None] * 5


def _blocks(length: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _own_logs(
    q_int: torch.Tensor,
    k_int: torch.Tensor,
    bias: torch.Tensor,
    carry: torch.Tensor,
    block: slice,
    alpha: float | SoftStep,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log I of a block of queries and the keys up to its end [B, rows, keys], given that of the query before [B, T]
    (0 for keys behind it), and the slope of the pair's own factor in it."""
    keys = slice(0, block.stop)
    scores = q_int[:, block] @ k_int[:, keys].transpose(1, 2) * q_int.shape[2] ** -0.5 + bias.to(q_int.dtype)
    logs, slope = log_alpha_sigmoid(scores, alpha)
    query = torch.arange(block.start, block.stop, device=q_int.device)[:, None]
    earlier = torch.arange(block.stop, device=q_int.device) < query
    # No term is above 0, so that one under FLOOR brings the sum under it too, as far as it may be.
    logs = torch.where(earlier, logs.clamp_(min=FLOOR), 0.0)
    logs = (_up_to(logs) @ logs).add_(carry[:, None, keys])
    logs = logs.clamp_(min=FLOOR) if alpha != math.inf else logs.masked_fill_(logs <= FLOOR, -math.inf)
    return logs, torch.where(earlier, slope, 0.0)


def _up_to(x: torch.Tensor) -> torch.Tensor:
    """[n, n] for x [B, n, ...]: times x, its running sum over dim 1. Each key's own sum is too little work for a
    GPU to go down it in order."""
    return torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).tril()


def _logits(q: torch.Tensor, k: torch.Tensor, total: torch.Tensor, block: slice, dim: int) -> torch.Tensor:
    """[B, H, rows, keys], -inf where a query cannot see."""
    logits = (q[:, :, block] @ k[:, :, : block.stop].transpose(2, 3)).to(total.dtype) * dim**-0.5
    query = torch.arange(block.start, block.stop, device=q.device)[:, None]
    future = torch.arange(block.stop, device=q.device) > query
    return logits.add_(total.masked_fill(future, -math.inf)[:, None])
