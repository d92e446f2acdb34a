"""Attention over whole sequences whose tokens fade behind a window, and its gradients: plain PyTorch, a block of
queries at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

GONE = -24 * math.log(2)
"""A token whose logarithm is less is evicted. In float32 ``1 - p`` is 0 from there on, if p is what is gone."""

BLOCK_M = 512
"""The weights of so many queries are in memory at once."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over j <= i of ``scale * q_i . k_j + [i - j > W] log_kept_j``, times v (DMS, arXiv 2506.05345).

    Args:
        q: [N, H, d], sequences one after the other.
        k, v: [N, KV heads, d]; query head h reads KV head h // (H / KV heads).
        log_kept: [N, KV heads], at most 0: logarithm of what is left of a token behind its window. Less than
            :data:`GONE` means -inf, which is nothing.
        cu_seqlens: [S + 1] int: where each sequence begins, and N.
        window: W.
        scale: of the logits.

    Returns:
        out [N, H, d] in q's dtype, and the logarithm of the softmax's denominator [H, N], float32 or wider.
    """
    out, lse = q.new_empty(q.shape), _wide(q).new_empty(q.shape[1], q.shape[0])
    for at, logits, _, value, _ in _blocks(q, k, v, log_kept, cu_seqlens, window, scale):
        lse[:, at] = logits.logsumexp(-1)
        out[at] = (logits.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and log_kept (float32 or wider), from that of ``out`` and from what :func:`forward` saw.

    With P the weights and dP_ij = grad_out_i . v_j, the gradient of a logit is ``P_ij (dP_ij - sum_j P_ij dP_ij)``.
    That of log_kept_j is its sum over the queries behind the window. The inner sum equals ``grad_out_i . out_i``,
    but is taken over the weights here, and ``out`` is not read.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    wide_q, wide_grad = _wide(q).transpose(0, 1), _wide(grad_out).transpose(0, 1)  # [H, N, d]
    grad_q, grad_k, grad_v = torch.zeros_like(wide_q), torch.zeros_like(wide_q), torch.zeros_like(wide_q)
    grad_kept = torch.zeros_like(lse)
    for at, logits, keys, value, behind in _blocks(q, k, v, log_kept, cu_seqlens, window, scale):
        weights = (logits - lse[:, at, None]).exp()
        grad_v[:, keys] += weights.transpose(1, 2) @ wide_grad[:, at]
        through = wide_grad[:, at] @ value.transpose(1, 2)
        grad_logits = weights * (through - (weights * through).sum(-1, keepdim=True))
        grad_q[:, at] = scale * (grad_logits @ _by_head(k, heads)[:, keys])
        grad_k[:, keys] += scale * (grad_logits.transpose(1, 2) @ wide_q[:, at])
        grad_kept[:, keys] += (grad_logits * behind).sum(1)

    def to_kv(grad: torch.Tensor) -> torch.Tensor:
        grouped = grad.view(kv_heads, heads // kv_heads, *grad.shape[1:])
        return grouped.sum(1).transpose(0, 1).contiguous()

    grads = grad_q.transpose(0, 1).to(q.dtype).contiguous(), to_kv(grad_k).to(k.dtype), to_kv(grad_v).to(v.dtype)
    return *grads, to_kv(grad_kept)


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> Iterator[tuple[slice, torch.Tensor, slice, torch.Tensor, torch.Tensor]]:
    """For each block of queries: where it is, its logits [H, queries, keys] (-inf: not seen), where the keys are,
    their values [H, keys, d], and which keys are behind the window [queries, keys]."""
    heads = q.shape[1]
    bounds = cu_seqlens.tolist()
    query, key, value = _wide(q).transpose(0, 1), _by_head(k, heads), _by_head(v, heads)
    fading = _by_head(log_kept[..., None], heads)[..., 0].to(query.dtype)  # [H, N]
    fading = fading.masked_fill(fading < GONE, float("-inf"))
    for start, end in zip(bounds[:-1], bounds[1:]):
        for first in range(0, end - start, BLOCK_M):
            last = min(first + BLOCK_M, end - start)
            position = torch.arange(last, device=q.device)
            back = position[first:, None] - position
            at, keys = slice(start + first, start + last), slice(start, start + last)
            logits = scale * (query[:, at] @ key[:, keys].transpose(1, 2))
            logits = logits + torch.where(back > window, fading[:, None, keys], 0.0)
            yield at, logits.masked_fill(back < 0, float("-inf")), keys, value[:, keys], back > window


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, KV heads, d] to [H, N, d], wide."""
    return _wide(x).transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)
