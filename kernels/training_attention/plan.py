"""Which blocks of keys each tile of queries visits, and which blocks of queries each tile of keys.

D_ij only falls with i and rises with j, so what a tile of queries sees is a suffix of the keys before it, and what
a tile of keys is seen by is a stretch of the queries that begins at it. Both follow from one search in the running
sum of the log gates (ACP, arXiv 2504.06949, section 3; here for the backward pass as well). Nothing is read on the
host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Decay:
    """The running sum c [H, N] of the log forget gates, which differences of near tokens must survive: as a float64
    tensor for searching, negated, and as two float32 parts that add up to it for the kernels."""

    negated: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor

    @classmethod
    def of(cls, log_forget: torch.Tensor) -> Decay:
        """Of [N, H] log gates."""
        # Along the last dimension, where PyTorch's GPU scan works in parallel.
        c = log_forget.T.double().contiguous().cumsum(1)
        high = c.float()
        return cls(-c, high, (c - high).float())


@dataclass(frozen=True)
class Tiles:
    """Equal stretches of all sequences.

    Attributes:
        bounds: [tiles, 3] int32: first token of the tile, first token of its sequence, end of its sequence. There
            are as many as any division into sequences may need; those left over begin at the end of theirs.
        limit: [H, tiles] int32: first block of keys that a tile of queries visits, or last block of queries that a
            tile of keys does, counted from the sequence's first token.
        order: [H * tiles] int32: tiles of all heads (head * tiles + tile), those with most work first.
    """

    bounds: torch.Tensor
    limit: torch.Tensor
    order: torch.Tensor


def _bounds(cu_seqlens: torch.Tensor, tokens: int, size: int) -> torch.Tensor:
    """[tiles, 3] int64, as :class:`Tiles` has them."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    counts = (ends - starts + size - 1) // size
    up_to = counts.cumsum(0)
    tile = torch.arange(tokens // size + len(starts), device=cu_seqlens.device)
    sequence = torch.searchsorted(up_to, tile, right=True)
    left_over = sequence == len(starts)
    sequence = sequence.clamp(max=len(starts) - 1)
    start = starts[sequence] + (tile - (up_to - counts)[sequence]) * size
    start = torch.where(left_over, ends[sequence], start)
    return torch.stack((start, starts[sequence], ends[sequence]), 1)


def query_tiles(decay: Decay, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int) -> Tiles:
    """Tiles of ``size`` queries that visit blocks of ``block`` keys."""
    tokens = decay.high.shape[1]
    bounds = _bounds(cu_seqlens.long(), tokens, size)
    start, begin, end = bounds.unbind(1)
    # The first query of a tile sees furthest back: c_j <= c_start - threshold.
    target = decay.negated[:, start.clamp(max=tokens - 1)] + threshold[:, None]
    first = torch.searchsorted(decay.negated, target)
    limit = torch.minimum(torch.maximum(first, begin), start).sub(begin) // block
    work = (torch.minimum(start + size, end) - begin) // block - limit
    return _tiles(bounds, limit, work.where(start < end, -1))


def key_tiles(decay: Decay, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int) -> Tiles:
    """Tiles of ``size`` keys that visit blocks of ``block`` queries."""
    tokens = decay.high.shape[1]
    bounds = _bounds(cu_seqlens.long(), tokens, size)
    start, begin, end = bounds.unbind(1)
    # The last key of a tile is seen longest: c_i >= c_last + threshold.
    newest = (torch.minimum(start + size, end) - 1).clamp(min=0)
    target = decay.negated[:, newest] - threshold[:, None]
    last = torch.searchsorted(decay.negated, target, right=True) - 1
    limit = torch.minimum(torch.maximum(last, newest), end - 1).sub(begin) // block
    return _tiles(bounds, limit, (limit - (start - begin) // block).where(start < end, -1))


def _tiles(bounds: torch.Tensor, limit: torch.Tensor, work: torch.Tensor) -> Tiles:
    order = work.flatten().argsort(descending=True, stable=True)
    return Tiles(bounds.int().contiguous(), limit.int().contiguous(), order.int())
