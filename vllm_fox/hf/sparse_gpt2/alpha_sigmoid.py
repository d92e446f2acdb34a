"""The alpha-sigmoid: alpha-entmax (Peters et al., arXiv 1905.05702) of two classes, of which one has logit 0."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch

STEPS = 40
"""Number of bisection steps in the search for log p: the result is more precise than float32."""
LEAST = -80.0
"""Logarithm of the least p other than 0."""
WIDEST, CELLS = 40.0, 16384
"""A table of p covers scores up to WIDEST away from 0, in CELLS cells."""


class _AlphaSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, alpha: float) -> torch.Tensor:
        p = _solve(s, alpha)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (p,) = ctx.saved_tensors
        # entmax's Jacobian is diag(u) - u u^T / sum(u) with u = p^(2 - alpha) where p > 0, else 0.
        u, w = (torch.where(x > 0, x.clamp(min=math.exp(LEAST)) ** (2 - ctx.alpha), 0.0) for x in (p, 1 - p))
        return grad * torch.where((u > 0) & (w > 0), 1 / (1 / u + 1 / w), 0.0), None


def alpha_sigmoid(s: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return p with ``p^a - (1 - p)^a = a s`` for ``a = alpha - 1``; 0 or 1 if ``|a s| >= 1`` (arXiv 2305.15805).

    This is the logistic function for alpha 1 and ``clamp((s + 1) / 2, 0, 1)`` for alpha 2. It comes closer to a
    step as alpha grows, and an infinite alpha gives the step itself, ``s > 0``.

    Args:
        s: any shape, float32 or float64.
        alpha: at least 1.

    Returns:
        p, of the shape and dtype of s. It is differentiable in s unless alpha is infinite.

    Raises:
        ValueError: alpha is under 1.
    """
    if not alpha >= 1:
        raise ValueError(f"alpha_sigmoid: alpha is {alpha}: it must be at least 1.")
    if alpha == math.inf:
        return (s > 0).to(s.dtype)
    if alpha == 1:
        return torch.sigmoid(s)
    result: torch.Tensor = _AlphaSigmoid.apply(s, alpha)
    return result


class SoftStep(NamedTuple):
    """The alpha-sigmoid of one alpha as tensors only, so that code compiled for one alpha serves every alpha.

    Attributes:
        table: [CELLS + 1] float32, the smaller of p and 1 - p at scores from 0 on.
        scale: [], number of cells per unit of score.
        power: [], 2 - alpha.
    """

    table: torch.Tensor
    scale: torch.Tensor
    power: torch.Tensor


@lru_cache(maxsize=2)
def soft_step(alpha: float, device: torch.device) -> SoftStep:
    """Make the tensors of one alpha for training, where alpha changes from step to step.

    They are made on the device, so that a GPU need not wait for a busy CPU.

    Raises:
        ValueError: alpha is under 1, or infinite.
    """
    if not 1 <= alpha < math.inf:
        raise ValueError(f"soft_step: alpha is {alpha}: it must be at least 1, and finite.")
    width = WIDEST if alpha == 1 else min(WIDEST, 1 / (alpha - 1))
    scores = torch.linspace(0, -width, CELLS + 1, dtype=torch.float64, device=device)
    table = torch.sigmoid(scores) if alpha == 1 else _solve(scores, alpha)
    # These are filled on the device, because a copy from the host would cost a wait.
    scale, power = (torch.full((), x, dtype=torch.float32, device=device) for x in (CELLS / width, 2 - alpha))
    return SoftStep(table.float(), scale, power)


@torch.no_grad()
def log_alpha_sigmoid(s: torch.Tensor, alpha: float | SoftStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log of :func:`alpha_sigmoid` and the slope of that log at s; they are -inf and 0 where p is 0.

    No autograd graph is recorded. With a :class:`SoftStep`, p is interpolated to about 1e-6, because bisection
    takes a hundred passes over the scores, and a training step has many more scores than tokens.
    """
    power: float | torch.Tensor
    if isinstance(alpha, SoftStep):
        small, power = _interpolate(s, alpha), alpha.power
    elif alpha == math.inf:
        return torch.zeros_like(s).masked_fill(s <= 0, -math.inf), torch.zeros_like(s)
    elif alpha == 1:
        logs = torch.nn.functional.logsigmoid(s)
        return logs, -torch.expm1(logs)
    else:
        small, power = _solve(-s.abs(), alpha), 2 - alpha
    negative = s < 0
    p = torch.where(negative, small, 1 - small)
    logs = torch.where(negative, small.log(), torch.log1p(-small))
    # This is _AlphaSigmoid's gradient, divided by p.
    u, w = small.clamp(min=math.exp(LEAST)).pow(power), (1 - small).pow(power)
    return logs, torch.where(small > 0, 1 / ((1 / u + 1 / w) * p), 0.0)


def _interpolate(s: torch.Tensor, step: SoftStep) -> torch.Tensor:
    """Return the smaller of p and 1 - p, interpolated in the table."""
    at = (s.abs() * step.scale).clamp(max=CELLS)
    cell = at.int().clamp(max=CELLS - 1)
    part = at - cell
    low, high = step.table[cell], step.table[cell + 1]
    return torch.where(at >= CELLS, 0.0, low + part * (high - low))


def _solve(s: torch.Tensor, alpha: float) -> torch.Tensor:
    if alpha == 2:
        return ((s + 1) / 2).clamp(0, 1)
    if alpha == 1.5:
        half = (s / 2).clamp(-1, 1)
        return ((half + (2 - half.square()).sqrt()) / 2).square()
    a = alpha - 1
    # The search is for the logarithm of the smaller of p and 1 - p, because attention uses the logarithm of p.
    target = -s.abs().clamp(max=1 / a)
    low, high = torch.full_like(s, LEAST), torch.full_like(s, math.log(0.5))
    for _ in range(STEPS):
        middle = (low + high) / 2
        # (p^a - (1 - p)^a) / a, also for small a.
        value = (torch.expm1(a * middle) - torch.expm1(a * torch.log1p(-middle.exp()))) / a
        low, high = torch.where(value < target, middle, low), torch.where(value < target, high, middle)
    small = torch.where(target <= -1 / a, 0.0, ((low + high) / 2).exp())
    return torch.where(s < 0, small, 1 - small)
