"""The backward pass of a gated MLP's product as one Triton kernel, which reads and writes every number once.

It is bound by memory. A program has a part of one row, and a thread 16 bytes of each tensor at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launcher

COLUMNS = 1024
"""Most columns of a program."""


@triton.jit
def _product_backward(
    grad, gate_up, grad_gate_up, product,
    grad_stride, gate_up_stride,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < SIZE
    read, write = gate_up + row * gate_up_stride + column, grad_gate_up + row * 2 * SIZE + column
    gate = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(read + SIZE, mask=inside, other=0.0).to(tl.float32)
    given = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    # Both sigmoids from an exponential that cannot overflow.
    small = tl.exp(-tl.abs(gate))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    one = tl.where(gate >= 0.0, larger, smaller)
    rest = tl.where(gate >= 0.0, smaller, larger)
    if SILU:
        act = gate * one
        slope = one * (1.0 + gate * rest)
    else:
        act = one
        slope = one * rest
    tl.store(write, (given * up * slope).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(write + SIZE, (given * act).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(product + row * SIZE + column, (act * up).to(product.dtype.element_ty), mask=inside)


_launch = Launcher(_product_backward)


def product_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.product_backward`."""
    grad, gate_up = (x if x.stride(1) == 1 else x.contiguous() for x in (grad, gate_up))
    rows, size = grad.shape
    grad_gate_up, product = gate_up.new_empty(gate_up.shape), gate_up.new_empty(grad.shape)
    if rows:
        columns = min(COLUMNS, triton.next_power_of_2(size))
        _launch(
            (rows, triton.cdiv(size, columns), 1),
            (grad, gate_up, grad_gate_up, product),
            (),
            (grad.stride(0), gate_up.stride(0)),
            (size, columns, activation == "silu"),
            num_warps=4,
        )
    return grad_gate_up, product
