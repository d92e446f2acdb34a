"""The gradients of a sum and of its RMS norm as one Triton kernel, which reads and writes every element once.

A program takes some rows at a time, each of them whole. The gradient of the weight is a sum over all rows: a
program keeps the sum over its own in registers and writes it at the end, and PyTorch adds up those of all programs.
Which rows a program takes depends on nothing but the shape and the device, and nothing is added up atomically, so
results are the same, bit by bit, in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launcher
from ..leaf import num_processors

PART = 4
"""A thread has so many elements of each tensor at a time, which it reads and writes at once in float32."""
WARPS, REGISTERS = 48, 40
"""So many warps of a processor have registers for that, and so many each thread of theirs."""


@triton.jit(do_not_specialize=["rows"])
def _backward(
    total, inverse, weight, grad_total, grad_normed, grad_x, grad_delta, sums, rows,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DELTA: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    there = column < N
    factor = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * N + column[None, :]
        mask = (row < rows)[:, None] & there[None, :]
        value = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        from_norm = tl.load(grad_normed + at, mask=mask, other=0.0).to(tl.float32)
        from_total = tl.load(grad_total + at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
        unit = value * scale
        weighted = from_norm * factor[None, :]
        along = tl.sum(weighted * unit, 1)[:, None] / N
        grad = from_total + scale * (weighted - unit * along)
        tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
        if DELTA:
            tl.store(grad_delta + at, grad.to(grad_delta.dtype.element_ty), mask=mask)
        if WEIGHT:
            summed += tl.sum(from_norm * unit, 0)
    if WEIGHT:
        tl.store(sums + tl.program_id(0).to(tl.int64) * N + column, summed, mask=there)


_launch = Launcher(_backward)


def backward(
    total: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    grad_total: torch.Tensor,
    grad_normed: torch.Tensor,
    x_dtype: torch.dtype,
    delta_dtype: torch.dtype | None,
    with_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`. All tensors are contiguous."""
    rows, n = total.shape
    block, at_once, warps, programs = _shares(rows, n, total.device)
    grad_x = torch.empty_like(total, dtype=x_dtype)
    grad_delta = total.new_empty(0 if delta_dtype is None else total.shape, dtype=delta_dtype or inverse.dtype)
    sums = inverse.new_empty((programs, n) if with_weight else 0)
    if rows:
        _launch(
            (programs, 1, 1),
            (total, inverse, weight, grad_total, grad_normed, grad_x, grad_delta, sums),
            (rows,),
            (),
            (n, block, at_once, delta_dtype is not None, with_weight),
            num_warps=warps, maxnreg=REGISTERS if warps < WARPS // 2 else None,
        )  # fmt: skip
    return grad_x, grad_delta, sums.sum(0) if with_weight else sums


def _shares(rows: int, n: int, device: torch.device) -> tuple[int, int, int, int]:
    """Columns and rows of a block, the warps of a program, and programs, for ``rows`` rows of ``n``."""
    block = triton.next_power_of_2(n)
    warps = min(32, max(4, block // (32 * PART)))
    at_once = max(1, 32 * warps * PART // block)
    programs = min(triton.cdiv(rows, at_once), num_processors(device) * (WARPS // warps))
    return block, at_once, warps, programs
