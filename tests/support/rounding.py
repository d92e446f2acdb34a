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
from typing import NamedTuple

import torch

DEVIATIONS = 6.0
STEPS = 4.0
"""Roundings in a row that stand where one is counted: log2 e, an exponential, a division, the way back."""
ANCHOR = 128
"""Tokens over which decay is added up before it is rounded."""


def _root(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Root of the sum of squares, with the dimension kept."""
    return x.square().sum(dim, keepdim=True).sqrt()


class _Errors:
    """Deviations that roundings have.

    Args:
        dtype: of the inputs.
        dim, length: d and T.

    Attributes:
        u: unit roundoff of the dtype; inside: the deviation of a rounding to it; least: what underflow loses.
        w: deviation of the few roundings in float32 that stand where one is counted.
        scale: of the logits; terms: root of how often a sum over d and over T rounds.
    """

    def __init__(self, dtype: torch.dtype, dim: int, length: int) -> None:
        info = torch.finfo(dtype)
        self.u, self.inside = info.eps / 2, info.eps / 2 / math.sqrt(3)
        self.least = info.smallest_normal * info.eps / 2 if dtype == torch.float16 else 0.0
        self.w = STEPS * torch.finfo(torch.float32).eps / 2
        self.dim, self.scale, self.terms = dim, dim**-0.5, math.sqrt(dim + length / 16)

    def product(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of the products of two lists of vectors: [H, M, T]."""
        return self.w * math.sqrt(self.dim) * (x.square() @ y.square().mT).sqrt()

    def returned(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """How far ``x`` may be off that deviates by ``e`` and is then rounded to the dtype."""
        return DEVIATIONS * e + self.u * (x.abs() + DEVIATIONS * e) + self.least


class _Attention(NamedTuple):
    """Attention of the last M of T tokens, and deviations.

    Attributes:
        p, e_p: [H, M, T] weights; rounded_p: deviation of what enters a matrix product of them.
        lost: [H, M, T] pairs that may be pruned; causal: [M, T].
        out, e_out: [H, M, d].
        e_lse: [H, M, 1] of the logarithm of a row's sum.
    """

    p: torch.Tensor
    e_p: torch.Tensor
    rounded_p: torch.Tensor
    lost: torch.Tensor
    causal: torch.Tensor
    out: torch.Tensor
    e_out: torch.Tensor
    e_lse: torch.Tensor


def last_outputs_and_bounds(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_forget: torch.Tensor, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for the last tokens of one sequence in float64, and how far each number may be off: [M, H, d].

    Args:
        q: [M, H, d]; k, v: [T, KV heads, d]; their dtype decides about u.
        log_forget: [T, H].
        threshold: [H]; pairs with D_ij below it may be missing.
    """
    query, key, value = _by_head(q, k, v)
    err = _Errors(q.dtype, q.shape[-1], len(k))
    found = _attention(query, key, value, log_forget.double().cumsum(0).T, threshold.double(), err)
    return found.out.transpose(0, 1), err.returned(found.out, found.e_out).transpose(0, 1)


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
    query, key, value = _by_head(q, k, v)
    grad, c = grad_out.double().transpose(0, 1), log_forget.double().cumsum(0).T
    parts = []
    for start, end in zip(bounds[:-1], bounds[1:]):
        if start < end:
            at = slice(start, end)
            err = _Errors(q.dtype, q.shape[-1], end - start)
            parts.append(
                _one_sequence(
                    query[:, at], key[:, at], value[:, at], grad[:, at], c[:, at], threshold.double(), err
                )
            )
    values, errors = ([torch.cat(x, 1) for x in zip(*which)] for which in zip(*parts))
    for n in (2, 3):  # a KV head's gradient is the sum of its query heads'
        values[n] = values[n].unflatten(0, (-1, groups)).sum(1)
        errors[n] = errors[n].unflatten(0, (-1, groups)).sum(1)
    return [x.transpose(0, 1) for x in values], [x.transpose(0, 1) for x in errors]


def _by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[H, tokens, d] in float64, with K and V for each query head."""
    groups = q.shape[1] // k.shape[1]
    key, value = (x.double().transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
    return q.double().transpose(0, 1), key, value


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    c: torch.Tensor,
    threshold: torch.Tensor,
    err: _Errors,
) -> _Attention:
    """Of the last [H, M, d] queries over all [H, T, d] keys, with c [H, T]."""
    length, first = key.shape[1], key.shape[1] - query.shape[1]
    # The formulas.
    causal = torch.ones(length - first, length, dtype=torch.bool).tril(first)
    decay = c[:, first:, None] - c[:, None]
    logits = (err.scale * query @ key.mT + decay).masked_fill(~causal, -math.inf)
    p, lse = logits.softmax(-1), logits.logsumexp(-1)
    out = p @ value
    # Their errors.
    since = (c - c[:, torch.arange(length) // ANCHOR * ANCHOR]).abs()
    lost = causal & (decay < threshold[:, None, None])
    relative = err.scale * err.product(query, key) + err.w * (
        decay.abs() + since[:, first:, None] + since[:, None] + lse.abs()[:, :, None] + err.terms
    )
    pruned = (p * lost).sum(-1, keepdim=True) / DEVIATIONS
    e_p = torch.where(lost, p, p * (relative + pruned)).masked_fill(~causal, 0.0)
    rounded_p = (e_p.square() + (err.inside * p).square() + err.least**2 * causal).sqrt()
    e_lse = _root(e_p)
    e_out = (rounded_p.square() @ value.square() + (e_lse * out).square()).sqrt()
    return _Attention(p, e_p, rounded_p, lost, causal, out, e_out, e_lse)


def _one_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad: torch.Tensor,
    c: torch.Tensor,
    threshold: torch.Tensor,
    err: _Errors,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As above, of [H, T, d] and [H, T], and of one sequence."""
    p, e_p, rounded_p, lost, causal, out, e_out, e_lse = _attention(query, key, value, c, threshold, err)
    inside, w, scale, terms = err.inside, err.w, err.scale, err.terms

    # The formulas.
    through = grad @ value.mT
    delta = (p * through).sum(-1, keepdim=True)
    g = p * (through - delta)
    grad_v = p.mT @ grad
    grad_q, grad_k = scale * g @ key, scale * g.mT @ query
    column = g.sum(1)
    grad_gate = column.cumsum(1) - column

    # Their errors.
    e_grad_v = (rounded_p.square().mT @ grad.square()).sqrt()
    e_through = err.product(grad, value)
    # What a row subtracts, by the output, and by its own weights. The kernels correct the one to the other, up to
    # the error of the weights' sum.
    by_output = _root(grad * e_out) + _root(inside * grad * out) + w * math.sqrt(err.dim) * _root(grad * out)
    by_weights = _root(torch.cat((e_p * (through - delta), p * e_through, w * terms * p * through), -1))
    by_weights = by_weights + e_lse * by_output
    e_g = torch.where(lost, g.abs(), ((e_p * (through - delta)).square() + (p * e_through).square()).sqrt())
    rounded_g = (e_g.square() + ((inside + w * terms) * g).square() + err.least**2 * causal).sqrt()
    e_grad_q = scale * ((rounded_g.square() @ key.square()).sqrt() + by_output * (p @ key).abs())
    e_grad_k = (
        scale * (rounded_g.square().mT @ query.square() + (p * by_weights).square().mT @ query.square()).sqrt()
    )
    # Before token t: all that is in the columns of earlier keys, and what each row has of its mass there.
    in_columns = (e_g.square() + (w * terms * g).square()).sum(1)
    mass = p.cumsum(2) - p
    by_rows = (mass * by_weights).square().sum(1)
    e_grad_gate = (in_columns.cumsum(1) - in_columns + by_rows).sqrt() + w * grad_gate.abs()

    values = [out, grad_q, grad_k, grad_v]
    errors = [err.returned(x, e) for x, e in zip(values, (e_out, e_grad_q, e_grad_k, e_grad_v))]
    return [*values, grad_gate], [*errors, DEVIATIONS * e_grad_gate]
