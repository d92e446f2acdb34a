"""Which blocks of keys each tile of queries visits, and which blocks of queries each tile of keys: plain PyTorch.

D_ij only falls with i and rises with j, so what a tile of queries sees is a suffix of the keys before it, and what
a tile of keys is seen by is a stretch of the queries that begins at it. Both follow from one search in the running
sum of the log gates (ACP, arXiv 2504.06949, section 3; here for the backward pass as well).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...segments import tile_bounds

ANCHOR = 128
"""One token in so many, counted from its sequence's first, is an anchor, from which decay is counted. The kernels'
tiles and blocks divide this number, so that each has one anchor."""


@dataclass(frozen=True)
class Tiles:
    """Equal stretches of all sequences.

    Attributes:
        bounds: [tiles, 3] int32: first token of the tile, first token of its sequence, end of its sequence. A
            sequence's tiles follow those that the tokens before it may need at most; what is left over begins at
            its end.
        limit: [H, tiles] int32: first block of keys that a tile of queries visits, or last block of queries that a
            tile of keys does, counted from the sequence's first token.
        order: [KV heads * tiles] int32: tiles of all heads (head * tiles + tile), those with most work first. For
            tiles of keys the heads are KV heads, for which all their query heads' work counts.
    """

    bounds: torch.Tensor
    limit: torch.Tensor
    order: torch.Tensor


def running_sum(log_forget: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """c, the running sum of the log gates [N, H], as [3, H, N] float32 that differences of near tokens survive in.

    The first two add up to c. The third is what c has lost since the token's anchor, times log2 e.
    """
    c = log_forget.T.double().cumsum(1)
    high = c.float()
    token = torch.arange(c.shape[1], device=c.device)
    begin = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), token, right=True) - 1]
    near = (c - c[:, token - (token - begin) % ANCHOR]) * math.log2(math.e)
    return torch.stack((high, (c - high).float(), near.float()))


def query_tiles(c: torch.Tensor, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int) -> Tiles:
    """Tiles of ``size`` queries that visit blocks of ``block`` keys; ``c`` is :func:`running_sum`'s."""
    rising = -(c[0].double() + c[1])
    bounds = tile_bounds(cu_seqlens, rising.shape[1], size)
    start, begin, end = bounds.unbind(1)
    # The first query of a tile sees furthest back: c_j <= c_start - threshold.
    target = rising[:, start.clamp(max=rising.shape[1] - 1)] + threshold[:, None]
    first = torch.searchsorted(rising, target)
    limit = torch.minimum(torch.maximum(first, begin), start).sub(begin) // block
    work = (torch.minimum(start + size, end) - begin + block - 1) // block - limit
    return _tiles(bounds, limit, work.where(start < end, 0))


def key_tiles(
    c: torch.Tensor, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int, kv_heads: int
) -> Tiles:
    """Tiles of ``size`` keys that visit blocks of ``block`` queries."""
    rising = -(c[0].double() + c[1])
    bounds = tile_bounds(cu_seqlens, rising.shape[1], size)
    start, begin, end = bounds.unbind(1)
    # The last key of a tile is seen longest: c_i >= c_last + threshold.
    newest = (torch.minimum(start + size, end) - 1).clamp(min=0)
    target = rising[:, newest] - threshold[:, None]
    last = torch.searchsorted(rising, target, right=True) - 1
    limit = torch.minimum(torch.maximum(last, newest), end - 1).sub(begin) // block
    work = (limit - (start - begin) // block + 1).where(start < end, 0)
    return _tiles(bounds, limit, work.unflatten(0, (kv_heads, -1)).sum(1))


def _tiles(bounds: torch.Tensor, limit: torch.Tensor, work: torch.Tensor) -> Tiles:
    order = work.flatten().argsort(descending=True, stable=True)
    return Tiles(bounds.int(), limit.int(), order.int())
