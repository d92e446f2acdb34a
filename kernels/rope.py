"""Rotary position embedding."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary position embedding over the whole head, rotating halves (not neighbouring pairs).

    Args:
        x: [T, H, d].
        positions: [T], any integer dtype.
        base: the theta of RoPE.

    Returns:
        [T, H, d] in the dtype of ``x``; computed in float32 (float64 for float64 input).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    angle = angles(positions, x.shape[-1], base).to(work)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(work).split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def angles(positions: torch.Tensor, dim: int, base: float) -> torch.Tensor:
    """By what :func:`rotate` turns the pairs of a head of size ``dim`` at [T] positions: [T, dim / 2] float32."""
    half = dim // 2
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    return positions.to(torch.float32)[:, None] * frequency
