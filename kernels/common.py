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
def beside_float8(query):
    """Queries as they are multiplied with float8 numbers, and the power of two to multiply the products by.

    A GPU makes float16 of float8 with one instruction for two numbers, and bfloat16 with five. So queries in
    bfloat16 become float16, which is exact for all that are not below 2^-14 of the largest; those are off by at
    most 2^-25 of it.
    """
    size = 1.0
    if query.dtype == tl.bfloat16:
        wide = query.to(tl.float32)
        size = power_of_two_above(tl.max(tl.abs(wide)))
        query = (wide / size).to(tl.float16)
    return query, size


@triton.constexpr_function
def below_peak(dtype):
    """How far below the largest logit (to base 2) weights of ``dtype`` are 1.

    The least float16 is 2^-24. With 15 the largest weight is 2^15, so that those down to 2^-39 of it are not lost.
    """
    return 15.0 if dtype == tl.float16 else 0.0


@triton.jit(do_not_specialize=["number"])
def trial_kernel(out, number, stride, CONSTANT: tl.constexpr):
    """What ``launch.py`` tries out: ``number * CONSTANT`` plus the program's number at every stride-th place."""
    tl.store(out + tl.program_id(0) * stride, number * CONSTANT + tl.program_id(0))
