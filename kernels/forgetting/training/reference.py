"""Forgetting attention over whole sequences and its gradients: plain PyTorch, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .plan import running_sum

BLOCK_M = 512
"""The weights of so many queries are in memory at once."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax over j <= i, D_ij >= threshold of ``scale * q_i . k_j + D_ij``, times v (FoX, arXiv 2503.02130, with
    the pruning of ACP, arXiv 2504.06949), where D_ij is the sum of the log forget gates after j up to i.

    Args:
        q: [N, H, d], sequences one after the other.
        k, v: [N, KV heads, d]; query head h reads KV head h // (H / KV heads).
        log_forget: [N, H], at most 0, finite.
        cu_seqlens: [S + 1] int: where each sequence begins, and N.
        threshold: [H] float32; -inf prunes nothing.
        scale: of the logits.

    Returns:
        out [N, H, d] in q's dtype, the logarithm of the softmax's denominator [H, N], float32 or wider, and the
        gates' running sum, as :func:`.plan.running_sum` has it.
    """
    out, lse = q.new_empty(q.shape), _wide(q).new_empty(q.shape[1], q.shape[0])
    c = running_sum(log_forget, cu_seqlens)
    for at, logits, _, value in _blocks(q, k, v, c, cu_seqlens, threshold, scale):
        lse[:, at] = logits.logsumexp(-1)
        out[at] = (logits.softmax(-1) @ value).transpose(0, 1).to(q.dtype)
    return out, lse, c


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and log_forget (float32), from that of ``out`` and from what :func:`forward` saw.

    With P the weights and dP_ij = grad_out_i . v_j, the gradient of a logit is ``P_ij (dP_ij - sum_j P_ij dP_ij)``.
    The sum equals ``grad_out_i . out_i``, but only for an ``out`` that was never rounded: it is taken over the
    weights here, so that a row's gradients add up to zero (see :func:`gate_gradient`), and ``out`` is not read.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    wide_q, wide_grad = _wide(q).transpose(0, 1), _wide(grad_out).transpose(0, 1)  # [H, N, d]
    grad_q = torch.zeros_like(wide_q)
    grad_k, grad_v = torch.zeros_like(wide_q), torch.zeros_like(wide_q)
    # Sum over queries of the logits' gradients, by key: what D_ij = c_i - c_j passes on to c_j, but for the sign.
    column = torch.zeros_like(lse)
    for at, logits, keys, value in _blocks(q, k, v, c, cu_seqlens, threshold, scale):
        weights = (logits - lse[:, at, None]).exp()
        grad_v[:, keys] += weights.transpose(1, 2) @ wide_grad[:, at]
        through = wide_grad[:, at] @ value.transpose(1, 2)
        grad_logits = weights * (through - (weights * through).sum(-1, keepdim=True))
        grad_q[:, at] = scale * (grad_logits @ _by_head(k, heads)[:, keys])
        grad_k[:, keys] += scale * (grad_logits.transpose(1, 2) @ wide_q[:, at])
        column[:, keys] += grad_logits.sum(1)

    def to_kv(grad: torch.Tensor) -> torch.Tensor:
        grouped = grad.view(kv_heads, heads // kv_heads, *grad.shape[1:])
        return grouped.sum(1).transpose(0, 1).to(k.dtype).contiguous()

    grads = grad_q.transpose(0, 1).to(q.dtype).contiguous(), to_kv(grad_k), to_kv(grad_v)
    return *grads, gate_gradient(column, cu_seqlens).float().contiguous()


def gate_gradient(column: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Gradient of log_forget [N, H] from the sums [H, N] of the logits' gradients by key.

    The gate of token t is part of D_ij for all j < t <= i. A row's gradients sum to zero, since a softmax does not
    change if all its logits do alike, so all that reaches keys before t counts. This holds for the logits'
    gradients as they were computed only if what each row subtracts is the sum over its own weights: any remainder
    of a row is counted in the gates of all later tokens.
    """
    earlier = column.double().cumsum(1) - column  # of all sequences before as well
    bounds = cu_seqlens.long()
    first = bounds[:-1].clamp(max=column.shape[1] - 1)  # of an empty last sequence: not used
    base = earlier[:, first].repeat_interleave(bounds.diff(), dim=1, output_size=column.shape[1])
    return (earlier - base).T


def _blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    c: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> Iterator[tuple[slice, torch.Tensor, slice, torch.Tensor]]:
    """For each block of queries: where it is, its logits [H, queries, keys] (-inf: not seen), where the keys are
    that any head sees, and their values [H, keys, d]."""
    heads = q.shape[1]
    bounds = cu_seqlens.tolist()
    query, key, value = _wide(q).transpose(0, 1), _by_head(k, heads), _by_head(v, heads)
    for start, end in zip(bounds[:-1], bounds[1:]):
        sums = c[0, :, start:end].double() + c[1, :, start:end]  # c_t = sum over s <= t of log f_s
        for first in range(0, end - start, BLOCK_M):
            last = min(first + BLOCK_M, end - start)
            decay = sums[:, first:last, None] - sums[:, None, :last]
            position = torch.arange(last, device=q.device)
            seen = (position[first:, None] >= position) & (decay >= threshold[:, None, None])
            oldest = int(seen.any(1).any(0).int().argmax())
            at, keys = slice(start + first, start + last), slice(start + oldest, start + last)
            logits = scale * (query[:, at] @ key[:, keys].transpose(1, 2)) + decay[..., oldest:].to(query.dtype)
            yield at, logits.masked_fill(~seen[..., oldest:], float("-inf")), keys, value[:, keys]


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[N, KV heads, d] to [H, N, d], wide."""
    return _wide(x).transpose(0, 1).repeat_interleave(heads // x.shape[1], dim=0)
