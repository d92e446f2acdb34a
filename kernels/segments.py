"""Sums within segments of a tensor, and equal stretches of packed sequences, in plain PyTorch."""

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


def tile_bounds(cu_seqlens: torch.Tensor, tokens: int, size: int) -> torch.Tensor:
    """Equal stretches of packed sequences.

    Args:
        cu_seqlens: [S + 1] int: where each sequence begins, and N.
        tokens: N.
        size: tokens of a tile.

    Returns:
        [N // size + S, 3] int64: first token of the tile, first token of its sequence, end of its sequence. A
        sequence's tiles follow those that the tokens before it may need at most; what is left over begins at its
        end.
    """
    starts, ends = cu_seqlens.long()[:-1], cu_seqlens.long()[1:]
    first = starts // size + torch.arange(len(starts), device=starts.device)
    tile = torch.arange(tokens // size + len(starts), device=starts.device)
    sequence = torch.searchsorted(first, tile, right=True) - 1
    begin, end = starts[sequence], ends[sequence]
    start = begin + (tile - first[sequence]) * size
    return torch.stack((torch.minimum(start, end), begin, end), 1)
