"""Pieces that several Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def take_turn(EARLY: tl.constexpr):
    """Wait for the kernel before this one, and have the next one started. It stands before all else in a kernel.

    A kernel that is started ``EARLY`` (see :class:`.launch.Launcher`) may begin while the one before it still runs.
    """
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def page_id(chunk_of, entries, slot, stream, page, max_chunks, streams, CHUNK: tl.constexpr):
    """Page ids (int64) of pages ``page`` of one stream of the request in ``slot``."""
    chunk = tl.load(chunk_of + slot.to(tl.int64) * max_chunks + page // CHUNK)
    return tl.load(entries + (chunk.to(tl.int64) * streams + stream) * CHUNK + page % CHUNK).to(tl.int64)


@triton.jit
def masked_page_id(chunk_of, entries, slot, stream, page, mask, max_chunks, streams, CHUNK: tl.constexpr):
    """The same for a block of pages, of which those outside ``mask`` are not looked up (id 0)."""
    chunk = tl.load(chunk_of + slot.to(tl.int64) * max_chunks + page // CHUNK, mask=mask, other=0)
    where = (chunk.to(tl.int64) * streams + stream) * CHUNK + page % CHUNK
    return tl.load(entries + where, mask=mask, other=0).to(tl.int64)


@triton.jit
def row_of(query_start, rows, token):
    """The row that a token belongs to, the last of ``rows`` for tokens behind all of them."""
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        left = token < tl.load(query_start + middle)
        low, high = tl.where(left, low, middle), tl.where(left, middle, high)
    return low


@triton.jit
def power_of_two_above(x):
    """See :func:`.float8.power_of_two_above`."""
    bits = tl.maximum(x, 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def beside_float8(query, factor):
    """Queries [M, D] as they are multiplied with float8 numbers, and the factor [M, 1] of the products.

    A GPU makes float16 of two float8 numbers with one instruction, and bfloat16 of one with more. So queries in
    bfloat16 become float16. That is exact for numbers down to 2^-16 of a query's largest. Those below are off by at
    most 2^-24 of it.
    """
    size = tl.full([query.shape[0]], 1.0, tl.float32)
    if query.dtype == tl.bfloat16:
        wide = query.to(tl.float32)
        size = power_of_two_above(tl.max(tl.abs(wide), 1))
        query = (wide / size[:, None]).to(tl.float16)
    return query, (factor * size)[:, None]


@triton.jit
def peak_below(largest, dtype: tl.constexpr):
    """The logit (to base 2) at which weights are 1, for rows whose largest logit is ``largest``.

    The least float16 is 2^-24. So weights in float16 are up to 2^15, and those down to 2^-39 of the largest are not
    lost. A float32 of a million and more is too coarse to subtract 15 from it.
    """
    if dtype == tl.float16:
        largest -= tl.where(tl.abs(largest) < 1048576.0, 15.0, 0.0)
    return largest


@triton.jit(do_not_specialize=["number"])
def trial_kernel(out, number, stride, CONSTANT: tl.constexpr):
    """What ``launch.py`` tries out: ``number * CONSTANT`` plus the program's number at every stride-th place."""
    tl.store(out + tl.program_id(0) * stride, number * CONSTANT + tl.program_id(0))
