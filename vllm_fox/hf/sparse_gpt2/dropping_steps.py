"""What :mod:`.dropping_attention` computes between products of matrices, for a block of n queries and the keys up
to its end (m of them, the last n of which are the block's own). On a GPU torch.compile fuses each function, to one
pass over its pairs of tokens where PyTorch makes dozens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from .alpha_sigmoid import SoftStep, log_alpha_sigmoid

FLOOR = -85.0
"""Least log I in training: a gradient can still come from a token that is as good as dropped."""
CHUNK = 32
"""Queries over which a running sum is one product of matrices."""


def decide(
    products: torch.Tensor, bias: torch.Tensor, dim: int, alpha: float | SoftStep, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What each query leaves of each key, from ``q_int k_int^T`` [B, n, m]: log of the alpha-sigmoid, and its slope
    if that is wanted; 0 for keys that are not earlier. No log is above 0, so one under FLOOR brings the sum there
    too, as far as it may be."""
    logs, found = log_alpha_sigmoid(products * dim**-0.5 + bias.to(products.dtype), alpha)
    earlier = _age(products) > 0
    return torch.where(earlier, logs.clamp_(min=FLOOR), 0.0), torch.where(earlier, found, 0.0) if slope else None


def sums(x: torch.Tensor, carry: torch.Tensor, reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Running sums of x [B, n, m] over dim 1 that begin with ``carry`` [B, m], backwards if ``reverse``: those
    within each of C chunks [B, C, n / C, m], and what each chunk begins with [B, C, m].

    Both are products of matrices: going down each column in order is too little work at once for a GPU.
    """
    rows = CHUNK if x.shape[1] % CHUNK == 0 else x.shape[1]
    parts = x.unflatten(1, (-1, rows))
    within, chunks = _up_to(parts, rows, reverse) @ parts, parts.shape[1]
    totals = within[:, :, 0 if reverse else -1]
    before = _up_to(parts, chunks, reverse) - torch.eye(chunks, dtype=x.dtype, device=x.device)
    return within, before @ totals + carry[:, None]


def run_on(within: torch.Tensor, starts: torch.Tensor, step: bool) -> torch.Tensor:
    """log I [B, n, m] from its :func:`sums`."""
    logs = (within + starts[:, :, None]).flatten(1, 2)
    return logs.masked_fill_(logs <= FLOOR, -math.inf) if step else logs.clamp_(min=FLOOR)


def amount(logs: torch.Tensor) -> torch.Tensor:
    """Sum of I."""
    return logs.exp().sum()


def weights(
    products: torch.Tensor, total: torch.Tensor, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention weights in the type given and their sums [B, H, n, 1], both over the largest weight, and the
    logarithm of the sums themselves [B, H, n], from ``q k^T`` [B, H, n, m] and log I [B, n, m]."""
    logits = _logits(products, total, dim)
    peak = logits.amax(-1, keepdim=True)
    found = logits.sub_(peak).exp_()
    mass = found.sum(-1, keepdim=True)
    return found.to(dtype), mass, (peak + mass.log())[..., 0]


def weights_gradients(
    products: torch.Tensor,
    total: torch.Tensor,
    lse: torch.Tensor,
    passed: torch.Tensor,
    dim: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and gradients of ``q k^T`` in the type given, and gradients of log I [B, n, m].

    What a row subtracts is the mean of ``passed`` over the row's own weights. The output's product with its
    gradient is the same number, but for the output's rounding, which would put the same error into all of the row:
    log I sums gradients over queries, where such errors add up and what they are errors of cancels.

    Args:
        passed: gradient of the output times v [B, H, n, m].
    """
    found = _logits(products, total, dim).sub_(lse[..., None]).exp_()
    delta = (found * passed).sum(-1, keepdim=True) / found.sum(-1, keepdim=True)
    grad = (passed - delta).mul_(found)
    return found.to(dtype), (grad * dim**-0.5).to(dtype), grad.sum(1)


def own_gradients(down: torch.Tensor, own: torch.Tensor, share: torch.Tensor, counted: int) -> torch.Tensor:
    """Gradient of the layer's own log I [B, n, m]: of attention and of the mean of I, whose first ``counted``
    queries count. None comes from what is at the floor."""
    counts = torch.arange(own.shape[1], device=own.device)[:, None] < counted
    grad = down + torch.where(counts, share * own.exp(), 0.0)
    return torch.where(own > FLOOR, grad, 0.0)


def scores_gradients(within: torch.Tensor, starts: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Gradient of the scores [B, n, m] from the :func:`sums` of that of log I."""
    return (within + starts[:, :, None]).flatten(1, 2).mul_(slope)


@cache
def fused() -> SimpleNamespace:
    """The same functions, each as one kernel or few."""
    functions: tuple[Callable[..., Any], ...] = (
        decide, run_on, amount, weights, weights_gradients, own_gradients, scores_gradients,
    )  # fmt: skip
    return SimpleNamespace(**{one.__name__: torch.compile(one, dynamic=True) for one in functions})


def _up_to(like: torch.Tensor, n: int, reverse: bool) -> torch.Tensor:
    """[n, n]: times n numbers, their running sums."""
    ones = torch.ones(n, n, dtype=like.dtype, device=like.device)
    return ones.triu() if reverse else ones.tril()


def _age(pairs: torch.Tensor) -> torch.Tensor:
    """[n, m] how many tokens ago each key was."""
    n, m = pairs.shape[-2:]
    query, key = torch.arange(m - n, m, device=pairs.device), torch.arange(m, device=pairs.device)
    return query[:, None] - key


def _logits(products: torch.Tensor, total: torch.Tensor, dim: int) -> torch.Tensor:
    """[B, H, n, m], -inf where a query cannot see."""
    seen = total.masked_fill(_age(products) < 0, -math.inf)
    return (products.to(total.dtype) * dim**-0.5).add_(seen[:, None])
