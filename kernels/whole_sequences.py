"""Pieces of kernels over whole sequences, which are for training."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Launch(NamedTuple):
    """How a kernel is compiled: rows of its tiles, of the blocks that it visits, warps, pipeline stages, and most
    registers a thread."""

    tile: int
    block: int
    warps: int
    stages: int
    registers: int | None = None


@cache
def launches(dim: int, dtype: torch.dtype) -> tuple[Launch, Launch, Launch]:
    """The launches of the forward kernel, and of the backward kernels for queries and for keys."""
    if dtype == torch.float32:
        return (Launch(64, 32, 4, 2),) * 3 if dim <= 128 else (Launch(32, 16, 4, 1),) * 3
    if dim <= 64:
        # 168 registers let three programs share a processor, so that one's exponentials hide another's products.
        return Launch(128, 64, 4, 3), Launch(64, 64, 4, 3, 168), Launch(64, 64, 4, 2, 168)
    if dim <= 128:
        return Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)
    return Launch(64, 32, 4, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 1)


@triton.jit
def load(pointer, mask, MASKED: tl.constexpr):
    """Zeros where the mask says no; without a mask if no place needs one."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit
def sequence_of(cu_seqlens, sequences, steps, at, SIZE: tl.constexpr, EXTRA: tl.constexpr):
    """The last sequence s with ``cu_seqlens[s] // SIZE + s * EXTRA <= at``, for one number or a block of them.
    ``steps`` is how many bits the number of sequences has."""
    low = tl.zeros_like(at)
    high = low + sequences - 1
    for _ in range(steps):
        middle = (low + high + 1) // 2
        before = tl.load(cu_seqlens + middle).to(tl.int32) // SIZE + middle * EXTRA <= at
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit
def tile_of(cu_seqlens, sequences, steps, tile, SIZE: tl.constexpr):
    """First token of a tile, or of a block of tiles, and where its sequence begins and ends: see
    :func:`.segments.tile_bounds`."""
    sequence = sequence_of(cu_seqlens, sequences, steps, tile, SIZE, 1)
    begin = tl.load(cu_seqlens + sequence).to(tl.int32)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int32)
    return tl.minimum(begin + (tile - (begin // SIZE + sequence)) * SIZE, end), begin, end
