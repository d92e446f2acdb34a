"""How far forgetting attention and its gradients may be from the formulas, number by number.

The inputs are taken as they are given, rounded already, so what is bounded is the arithmetic alone. Every rounding
is taken as an error of its own with a mean of zero (Higham and Mary, "A new approach to probabilistic rounding
error analysis", 2019). So variances add up, and a number may be :data:`DEVIATIONS` standard deviations off, besides
what it is rounded by at the end. Let u be the unit roundoff of the inputs' dtype, by which a rounding deviates by
u / sqrt(3) of the number, and w that of float32, in which all sums are kept. These errors occur:

- in a product of two d-vectors, w times the root of d and of the sum of its squared terms;
- in a logit that, and w times the numbers that its decay is a difference of; in a weight P_ij as much, relatively;
- in what enters a matrix product of its own, u of each number: the weights, for the output and v's gradient, and
  the logits' gradients G, for those of q and k;
- in what is returned, u of each number, but for the gates' gradients;
- in the sum that a row of G subtracts from all its numbers, which for q's gradient is ``grad_out . out`` with
  ``out`` rounded, and for all others is the sum over the weights themselves;
- the pairs that are pruned, and their share of every other weight of their row.

So u does not occur in the gates' gradients at all: they are as exact in bfloat16 as in float32.
"""

from __future__ import annotations

import math

import torch

DEVIATIONS = 6.0
STEPS = 4.0
"""Roundings in a row that stand where one is counted: log2 e, an exponential, a division, the way back."""
ANCHOR = 128
"""Tokens over which decay is added up before it is rounded."""


def _root(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Root of the sum of squares, with the dimension kept."""
    return x.square().sum(dim, keepdim=True).sqrt()


def attention_and_bounds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    grad_out: torch.Tensor,
    bounds: list[int],
    threshold: torch.Tensor,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The output and the gradients of q, k, v and log_forget in float64, by arXiv 2503.02130 written out, and how
    far each number may be off.

    Args:
        q, grad_out: [T, H, d]; k, v: [T, KV heads, d]; their dtype decides about u.
        log_forget: [T, H].
        bounds: where each sequence begins, and T.
        threshold: [H]; pairs with D_ij below it may be missing.
    """
    groups = q.shape[1] // k.shape[1]
    wide = [x.double().transpose(0, 1) for x in (q, k, v, grad_out)]
    wide[1:3] = [x.repeat_interleave(groups, 0) for x in wide[1:3]]
    c = log_forget.double().cumsum(0).T
    parts = [
        _one_sequence(*(x[:, start:end] for x in (*wide, c)), threshold.double(), q.dtype)
        for start, end in zip(bounds[:-1], bounds[1:])
        if start < end
    ]
    values, errors = ([torch.cat(x, 1) for x in zip(*which)] for which in zip(*parts))
    for n in (2, 3):  # a KV head's gradient is the sum of its query heads'
        values[n] = values[n].unflatten(0, (-1, groups)).sum(1)
        errors[n] = errors[n].unflatten(0, (-1, groups)).sum(1)
    return [x.transpose(0, 1) for x in values], [x.transpose(0, 1) for x in errors]


def _one_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    c: torch.Tensor,
    threshold: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As above, of [H, T, d] and [H, T], and of one sequence."""
    info, w = torch.finfo(dtype), STEPS * torch.finfo(torch.float32).eps / 2
    u, inside = info.eps / 2, info.eps / 2 / math.sqrt(3)
    least = info.smallest_normal * info.eps / 2 if dtype == torch.float16 else 0.0  # float16 underflows
    length, dim = query.shape[1:]
    scale, terms = dim**-0.5, math.sqrt(dim + length / 16)

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Error of the products of two lists of vectors: [H, T, T]."""
        return w * math.sqrt(dim) * (x.square() @ y.square().mT).sqrt()

    # The formulas.
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    decay = c[:, :, None] - c[:, None]
    logits = (scale * query @ key.mT + decay).masked_fill(~causal, -math.inf)
    p, lse = logits.softmax(-1), logits.logsumexp(-1)
    through = grad @ value.mT
    delta = (p * through).sum(-1, keepdim=True)
    g = p * (through - delta)
    out, grad_v = p @ value, p.mT @ grad
    grad_q, grad_k = scale * g @ key, scale * g.mT @ query
    column = g.sum(1)
    grad_gate = column.cumsum(1) - column

    # Their errors.
    since = (c - c[:, torch.arange(length) // ANCHOR * ANCHOR]).abs()
    lost = causal & (decay < threshold[:, None, None])
    relative = scale * product(query, key) + w * (
        decay.abs() + since[:, :, None] + since[:, None] + lse.abs()[:, :, None] + terms
    )
    pruned = (p * lost).sum(-1, keepdim=True) / DEVIATIONS
    e_p = torch.where(lost, p, p * (relative + pruned)).masked_fill(~causal, 0.0)
    rounded_p = (e_p.square() + (inside * p).square() + least**2 * causal).sqrt()
    e_lse = _root(e_p)
    e_out = (rounded_p.square() @ value.square() + (e_lse * out).square()).sqrt()
    e_grad_v = (rounded_p.square().mT @ grad.square()).sqrt()
    e_through = product(grad, value)
    # What a row subtracts, by the output, and by its own weights. The kernels correct the one to the other, up to
    # the error of the weights' sum.
    by_output = _root(grad * e_out) + _root(inside * grad * out) + w * math.sqrt(dim) * _root(grad * out)
    by_weights = _root(torch.cat((e_p * (through - delta), p * e_through, w * terms * p * through), -1))
    by_weights = by_weights + e_lse * by_output
    e_g = torch.where(lost, g.abs(), ((e_p * (through - delta)).square() + (p * e_through).square()).sqrt())
    rounded_g = (e_g.square() + ((inside + w * terms) * g).square() + least**2 * causal).sqrt()
    e_grad_q = scale * ((rounded_g.square() @ key.square()).sqrt() + by_output * (p @ key).abs())
    e_grad_k = (
        scale * (rounded_g.square().mT @ query.square() + (p * by_weights).square().mT @ query.square()).sqrt()
    )
    # Before token t: all that is in the columns of earlier keys, and what each row has of its mass there.
    in_columns = (e_g.square() + (w * terms * g).square()).sum(1)
    mass = p.cumsum(2) - p
    by_rows = (mass * by_weights).square().sum(1)
    e_grad_gate = (in_columns.cumsum(1) - in_columns + by_rows).sqrt() + w * grad_gate.abs()

    values = [out, grad_q, grad_k, grad_v, grad_gate]
    errors = [DEVIATIONS * x for x in (e_out, e_grad_q, e_grad_k, e_grad_v, e_grad_gate)]
    return values, [*(e + u * (x.abs() + e) + least for e, x in zip(errors[:4], values)), errors[4]]
