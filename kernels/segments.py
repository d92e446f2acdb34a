"""Sums within segments of a tensor, for the plain PyTorch implementations."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def sums_since(x: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Sum each segment from its beginning.

    The sums are differences of one running sum, from which a NaN is kept out: it shows in the sums of its own
    segment and in no other. Segments of other requests stay as they are, whatever one request holds.

    Args:
        x: [n, ...] finite or NaN.
        first: [n] where the segment of each entry begins.

    Returns:
        [n + 1, ...] of which entry i is the sum of the entries ``first[i - 1]`` to ``i - 1``; the first is zero.
    """
    bad = x.isnan()

    def sums(values: torch.Tensor) -> torch.Tensor:
        running = pad(values.cumsum(0), [0, 0] * (x.ndim - 1) + [1, 0])
        return pad(running[1:] - running[first], [0, 0] * (x.ndim - 1) + [1, 0])

    return torch.where(sums(bad.long()) > 0, torch.nan, sums(x.masked_fill(bad, 0.0)))
