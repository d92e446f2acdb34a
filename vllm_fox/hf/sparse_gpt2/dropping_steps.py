"""The steps of :mod:`.dropping_attention` between its matrix products.

Each works on a block of n queries and the m keys up to the block's end, of which the last n are the block's own.
On a GPU torch.compile fuses each function into one pass over the pairs of tokens, where PyTorch makes dozens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from .alpha_sigmoid import SoftStep, log_alpha_sigmoid

FLOOR = -85.0
"""Least log I in training. It is so low that a token which is as good as dropped can still give a gradient."""
CHUNK = 32
"""Number of queries over which a running sum is computed as one matrix product."""


def decide(
    products: torch.Tensor, bias: torch.Tensor, dim: int, alpha: float | SoftStep, slope: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the log of the share that each query keeps of each key, and the slope of that log if ``slope``.

    The share is the alpha-sigmoid of the interaction score, which follows from ``products``, q_int k_int^T
    [B, n, m]. Log and slope are 0 for keys that are not earlier than the query. Logs are cut off at FLOOR: no log
    is above 0, so a single one at FLOOR already brings the running sum to its least value.
    """
    logs, found = log_alpha_sigmoid(products * dim**-0.5 + bias.to(products.dtype), alpha)
    earlier = _age(products) > 0
    return torch.where(earlier, logs.clamp_(min=FLOOR), 0.0), torch.where(earlier, found, 0.0) if slope else None


def sums(x: torch.Tensor, carry: torch.Tensor, reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute running sums of x [B, n, m] over dim 1 that begin with ``carry`` [B, m], backwards if ``reverse``.

    Both results are matrix products, because adding up each column in order is too little work at once for a GPU.

    Returns:
        The running sums within each of C chunks [B, C, n / C, m], and the value at which each chunk begins
        [B, C, m].
    """
    rows = CHUNK if x.shape[1] % CHUNK == 0 else x.shape[1]
    parts = x.unflatten(1, (-1, rows))
    within, chunks = _up_to(parts, rows, reverse) @ parts, parts.shape[1]
    totals = within[:, :, 0 if reverse else -1]
    before = _up_to(parts, chunks, reverse) - torch.eye(chunks, dtype=x.dtype, device=x.device)
    return within, before @ totals + carry[:, None]


def run_on(within: torch.Tensor, starts: torch.Tensor, step: bool) -> torch.Tensor:
    """Return log I [B, n, m] from its :func:`sums`. If ``step``, it is -inf where it would be FLOOR or less."""
    logs = (within + starts[:, :, None]).flatten(1, 2)
    return logs.masked_fill_(logs <= FLOOR, -math.inf) if step else logs.clamp_(min=FLOOR)


def amount(logs: torch.Tensor) -> torch.Tensor:
    """Return the sum of I, given log I."""
    return logs.exp().sum()


def weights(
    products: torch.Tensor, total: torch.Tensor, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute attention weights from ``products``, q k^T [B, H, n, m], and ``total``, log I [B, n, m].

    Returns:
        The weights in ``dtype`` and their sums [B, H, n, 1], both divided by the row's largest weight; and the
        logarithm of the undivided sums [B, H, n].
    """
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
    """Return the attention weights and the gradients of q k^T in ``dtype``, and the gradients of log I [B, n, m].

    The gradient of a row's softmax subtracts the mean of ``passed`` under the row's weights. The product of the
    output with its gradient is the same number except for the output's rounding, which would put the same error
    into the whole row. The gradient of log I is a sum over queries, in which such errors add up while the gradients
    themselves cancel.

    Args:
        passed: [B, H, n, m] product of the output's gradient with v.
    """
    found = _logits(products, total, dim).sub_(lse[..., None]).exp_()
    delta = (found * passed).sum(-1, keepdim=True) / found.sum(-1, keepdim=True)
    grad = (passed - delta).mul_(found)
    return found.to(dtype), (grad * dim**-0.5).to(dtype), grad.sum(1)


def own_gradients(down: torch.Tensor, own: torch.Tensor, share: torch.Tensor, counted: int) -> torch.Tensor:
    """Return the gradient of the layer's own log I [B, n, m]: that from attention plus that from the mean of I.

    The mean counts only the first ``counted`` queries. Values at FLOOR give no gradient.
    """
    counts = torch.arange(own.shape[1], device=own.device)[:, None] < counted
    grad = down + torch.where(counts, share * own.exp(), 0.0)
    return torch.where(own > FLOOR, grad, 0.0)


def scores_gradients(within: torch.Tensor, starts: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the interaction scores [B, n, m], given the :func:`sums` of the gradient of log I."""
    return (within + starts[:, :, None]).flatten(1, 2).mul_(slope)


@cache
def fused() -> SimpleNamespace:
    """Return the same functions, each compiled to one kernel or a few."""
    functions: tuple[Callable[..., Any], ...] = (
        decide, run_on, amount, weights, weights_gradients, own_gradients, scores_gradients,
    )  # fmt: skip
    return SimpleNamespace(**{one.__name__: torch.compile(one, dynamic=True) for one in functions})


def _up_to(like: torch.Tensor, n: int, reverse: bool) -> torch.Tensor:
    """Return the [n, n] matrix whose product with n numbers is their running sums."""
    ones = torch.ones(n, n, dtype=like.dtype, device=like.device)
    return ones.triu() if reverse else ones.tril()


def _age(pairs: torch.Tensor) -> torch.Tensor:
    """Return how many tokens each key is before each query: [n, m]."""
    n, m = pairs.shape[-2:]
    query, key = torch.arange(m - n, m, device=pairs.device), torch.arange(m, device=pairs.device)
    return query[:, None] - key


def _logits(products: torch.Tensor, total: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the logits [B, H, n, m], -inf where a query cannot see the key."""
    seen = total.masked_fill(_age(products) < 0, -math.inf)
    return (products.to(total.dtype) * dim**-0.5).add_(seen[:, None])
