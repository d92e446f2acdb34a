"""The gradients of a sum and its RMS norm, against the formula in float64: the twin, or the Triton kernel."""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import library

from vllm_fox.kernels.rms_norm import _backward, add_rms_norm, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = 1e-6


class Given(NamedTuple):
    """What the operator takes besides dtypes, and what of it the gradients are asked of."""

    total: torch.Tensor
    inverse: torch.Tensor
    weight: torch.Tensor
    grad_total: torch.Tensor
    grad_normed: torch.Tensor


def given(rows: int, n: int, stream: torch.dtype, normed: torch.dtype, weight: torch.dtype = F32) -> Given:
    """Rows of very different sizes, some of zeros."""
    draw = torch.Generator().manual_seed(rows + n)
    x, grad_total, grad_normed = (torch.randn(rows, n, generator=draw) for _ in range(3))
    x = x * torch.logspace(-3, 2, rows)[:, None]
    x[::7] = 0
    factors = torch.randn(n, generator=draw).to(weight)
    total, _, inverse = reference.forward(x.to(stream), None, factors, EPS, normed)
    both = grad_total.to(stream), grad_normed.to(normed)
    return Given(*(y.to(DEVICE) for y in (total, inverse, factors, *both)))


def bounds(of: Given, grad: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """How far a gradient of x in a dtype, and the gradient of the weight, may be from what float64 gives.

    A sum of m products is off by at most so many unit roundoffs of float32 as it has terms, and by a few for these,
    of the sum of its terms' sizes, in whatever order it is added up.
    """
    total, inverse, weight, grad_total, grad_normed = (y.double() for y in of)
    u, (rows, n) = torch.finfo(torch.float32).eps / 2, total.shape
    unit = (total * inverse[:, None]).abs()
    weighted = (grad_normed * weight).abs()
    along = (weighted * unit).mean(-1, keepdim=True)
    inside = grad_total.abs() + inverse[:, None] * (weighted + unit * along)
    inside = 8 * u * inside + (n + 8) * u * inverse[:, None] * unit * along
    of_weight = (rows + 8) * u * (grad_normed.abs() * unit).sum(0)
    info = torch.finfo(dtype)
    # Triton's interpreter cuts digits off in bfloat16, which is twice as much.
    u = info.eps if INTERPRETED and dtype == BF16 else info.eps / 2
    rounding = u * (grad.abs() + inside) + info.smallest_normal * info.eps / 2
    return inside + rounding, of_weight


@pytest.mark.parametrize(
    ("stream", "normed", "weight", "delta"),
    [
        (F32, BF16, F32, BF16), (F32, F16, F32, F16), (BF16, BF16, BF16, None), (F32, F32, F32, None),
        (F16, F16, F16, None),
    ],
    ids=["autocast", "autocast to float16", "bfloat16", "float32", "float16"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("rows", "n"), [(1, 768), (203, 768), (67, 384), (23, 1536), (17, 2048), (5, 8192), (501, 30)]
)
def test_gradients_are_those_of_the_formula(
    rows: int, n: int, stream: torch.dtype, normed: torch.dtype, weight: torch.dtype, delta: torch.dtype | None
) -> None:
    of = given(rows, n, stream, normed, weight)
    grad_x, grad_delta, grad_weight = _backward(*of, stream, delta, True)
    wide = Given(*(y.double() for y in of))
    want, _, want_weight = reference.backward(*wide, torch.float64, None, True)
    for grad, dtype in ((grad_x, stream), (grad_delta, delta)):
        if dtype is None:
            assert grad.numel() == 0
            continue
        bound, bound_weight = bounds(of, want, dtype)
        assert grad.dtype == dtype and ((grad.double() - want).abs() <= bound).all()
    assert grad_weight.dtype == F32
    assert ((grad_weight.double() - want_weight).abs() <= bound_weight).all()


def test_results_are_the_same_in_every_run() -> None:
    of = given(300, 768, F32, BF16)
    for one, other in zip(*(_backward(*of, F32, BF16, True) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_a_weight_that_is_not_trained_changes_nothing_else() -> None:
    of = given(40, 768, F32, BF16)
    (*grads, weight), (*others, none) = (_backward(*of, F32, BF16, trained) for trained in (True, False))
    assert weight.shape == (768,) and none.numel() == 0
    for one, other in zip(grads, others, strict=True):
        assert torch.equal(one, other)


def test_no_rows() -> None:
    grad_x, grad_delta, weight = _backward(*given(0, 768, F32, BF16), F32, BF16, True)
    assert grad_x.shape == grad_delta.shape == (0, 768) and torch.equal(weight, torch.zeros_like(weight))


def test_gradients_may_lie_anyhow() -> None:
    """That of a sum is one number that is read many times."""
    of = given(9, 768, F32, BF16)
    one = of._replace(grad_total=of.grad_total[:1, :1].expand(9, 768), grad_normed=of.grad_normed.T.contiguous().T)
    same = one._replace(grad_total=one.grad_total.contiguous(), grad_normed=of.grad_normed)
    for x, y in zip(_backward(*one, F32, BF16, True), _backward(*same, F32, BF16, True), strict=True):
        assert x.is_contiguous() and torch.equal(x, y)


@pytest.mark.parametrize("asked", ["everything", "no weight", "no copy"])
def test_it_is_a_proper_operator(asked: str) -> None:
    """PyTorch's own checks: that its fake form has the same shapes and dtypes, as torch.compile needs it."""
    copy = None if asked == "no copy" else BF16
    stream = BF16 if asked == "no copy" else F32
    library.opcheck(_backward, (*given(5, 48, stream, BF16), stream, copy, asked != "no weight"))


@pytest.mark.parametrize("added", [True, False])
def test_gradients_are_those_of_autograd(added: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=draw).double().requires_grad_() for shape in ((6, 40), (6, 40), (40,))]
    x, delta, weight = leaves
    scales = [torch.randn(6, 40, generator=draw).double() for _ in range(2)]

    def gradients(total: torch.Tensor, normed: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.autograd.grad((total * scales[0] + normed * scales[1]).sum(), leaves, allow_unused=True)

    given_delta = delta if added else None
    own = add_rms_norm(x, given_delta, weight, EPS, torch.float64)
    plain = reference.forward(x, given_delta, weight, EPS, torch.float64)[:2]
    for one, other in zip((*own, *gradients(*own)), (*plain, *gradients(*plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
