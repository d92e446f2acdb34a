"""The backward pass of a gated MLP's product, against autograd's in float64: the twin, or the Triton kernel."""

from __future__ import annotations

import os

import pytest
import torch
from torch import library

from benchmarks.one_layer import DEVICE
from vllm_fox.kernels.gated_mlp import product_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STEPS = 8.0
"""Roundings in a row: two sigmoids, each an exponential, a sum and a quotient, and the products with them."""


def make_inputs(rows: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the product, and gate and up, in float32. Some sigmoids are nearly 0 or 1, or are."""
    rng = torch.Generator().manual_seed(size)
    grad, gate_up = torch.randn(rows, size, generator=rng), torch.randn(rows, 2 * size, generator=rng)
    gate_up[:, :size:3] *= 5
    gate_up[:, :size:7] *= 50
    return grad, gate_up


def check(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> None:
    """Each number within its rounding bound."""
    found = [x.cpu().double() for x in product_backward(grad, gate_up, activation)]
    given, (gate, up) = grad.cpu().double(), gate_up.cpu().double().chunk(2, 1)
    gate, up = (x.clone().requires_grad_() for x in (gate, up))
    act = torch.nn.functional.silu(gate) if activation == "silu" else gate.sigmoid()
    product = act * up
    want = [torch.cat(torch.autograd.grad(product, [gate, up], given), 1), product.detach()]
    # What is added up for the gradient of the gate may cancel. An exponential rounds its exponent.
    gate, up, act = gate.detach(), up.detach(), act.detach()
    largest = gate.sigmoid() * ((1 + gate.abs() * (-gate).sigmoid()) if activation == "silu" else 1)
    terms = [torch.cat((given * up * largest, given * act), 1), product.detach()]
    info, inside = torch.finfo(grad.dtype), torch.finfo(torch.promote_types(grad.dtype, torch.float32))
    cut = INTERPRETED and grad.dtype == torch.bfloat16  # to which Triton's interpreter does not round
    roundoff = info.eps if cut else info.eps / 2
    relative = inside.eps * (STEPS + gate.abs())
    lost = info.smallest_normal * (1 + given.abs()) * (1 + up.abs()) * (1 + gate.abs())  # numbers below it
    for one, other, term in zip(found, want, terms, strict=True):
        error, end, inner = (x.abs().unflatten(1, (-1, gate.shape[1])) for x in (one - other, other, term))
        assert (error <= roundoff * end + relative[:, None] * inner + lost[:, None]).all()


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(7, 40), (3, 1024), (2, 2500), (1, 1)])
def test_the_formula(rows: int, size: int, dtype: torch.dtype, activation: str) -> None:
    """Rows of one program and of several, and such as a program fills or not."""
    grad, gate_up = (x.to(DEVICE, dtype) for x in make_inputs(rows, size))
    check(grad, gate_up, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_gaps_and_columns_first(dtype: torch.dtype) -> None:
    """As in a product of more layers than the two, from any place of it on."""
    grad, gate_up = (x.to(DEVICE, dtype) for x in make_inputs(6, 24))
    wider = torch.full((6, 61), torch.nan, dtype=dtype, device=DEVICE)
    wider[:, 5:53] = gate_up
    check(grad, wider[:, 5:53], "silu")
    check(wider[:, 5:29], gate_up, "silu")
    columns_first = grad.T.contiguous().T, gate_up.T.contiguous().T
    check(*columns_first, "silu")
    assert all(x.is_contiguous() for x in product_backward(*columns_first, "silu"))


def test_no_rows() -> None:
    grad, gate_up = (x.to(DEVICE) for x in make_inputs(0, 24))
    found = product_backward(grad, gate_up, "silu")
    assert [x.shape for x in found] == [(0, 48), (0, 24)]


def test_what_is_not_finite_stays_in_its_column() -> None:
    grad, gate_up = (x.to(DEVICE) for x in make_inputs(2, 40))
    gate_up[0, 3] = torch.nan
    grads, product = product_backward(grad, gate_up, "silu")
    assert product[0, 3].isnan() and grads[0, 3].isnan() and grads[0, 43].isnan()
    assert grads.isnan().sum() == 2 and product.isnan().sum() == 1


def test_the_operator_is_registered_as_it_computes() -> None:
    wider = make_inputs(3, 8)[1].to(DEVICE)
    library.opcheck(product_backward, (wider[:, :6], wider[:, 2:14], "sigmoid"))
