"""Float8 pages: K and V as e4m3 with power-of-two scales, by which multiplication is exact."""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
"""The largest number that e4m3 has."""


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """The smallest normal power of two that is at least ``x`` (float32, not negative)."""
    bits = x.clamp(min=torch.finfo(torch.float32).tiny).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)
