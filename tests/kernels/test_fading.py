"""Attention whose tokens fade behind a window, and its gradients, against the formula in float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import library

from benchmarks.one_layer import DEVICE
from vllm_fox.kernels.subset.training import _backward, _forward, fading_attention
from vllm_fox.kernels.subset.training.reference import GONE

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Roundoff of the dtype, times the 10 or so roundings between an input and an output or gradient.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_inputs(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 32, seed: int = 0) -> list[torch.Tensor]:
    """q, k, v, log_kept and the gradient of the output. Tokens are whole, evicted or in between."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(heads, dim), (kv_heads, dim), (kv_heads, dim), (kv_heads,), (heads, dim)]
    q, k, v, logits, grad = (torch.randn(length, *shape, generator=rng) for shape in shapes)
    log_kept = torch.nn.functional.logsigmoid(4 * logits)
    log_kept[torch.rand(length, kv_heads, generator=rng) < 0.3] = float("-inf")
    log_kept[torch.rand(length, kv_heads, generator=rng) < 0.2] = 0.0
    return [q, k, v, log_kept, grad]


def formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_kept: torch.Tensor, window: int, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """The whole matrix of logits, which autograd differentiates."""
    group, position = q.shape[1] // k.shape[1], torch.arange(len(q))
    k, v, log_kept = (x.repeat_interleave(group, 1) for x in (k, v, log_kept))
    sequence = torch.searchsorted(cu_seqlens, position, right=True)
    back = position[:, None] - position
    logits = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    logits = logits + torch.where(back > window, log_kept.T[:, None], 0.0)
    seen = (back >= 0) & (sequence[:, None] == sequence)
    return torch.einsum("hij,jhd->ihd", logits.masked_fill(~seen, float("-inf")).softmax(-1), v)


def with_gradients(function, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def compare(inputs: list[torch.Tensor], window: int, bounds: list[int], dtype: torch.dtype = torch.float32) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    *tensors, log_kept, grad = inputs
    tensors, grad = [x.to(dtype) for x in tensors], grad.to(dtype)
    expected = with_gradients(
        lambda *x: formula(*x, window, cu_seqlens), [x.double() for x in [*tensors, log_kept]], grad.double()
    )
    found = with_gradients(
        lambda *x: fading_attention(*x, window=window, cu_seqlens=cu_seqlens.to(DEVICE)),
        [x.to(DEVICE) for x in [*tensors, log_kept]],
        grad.to(DEVICE),
    )
    for name, one, other in zip(("out", "q", "k", "v", "log_kept"), found, expected, strict=True):
        error = (one.cpu().double() - other).norm()
        assert error <= TOLERANCE[dtype] * other.norm(), (name, float(error), float(other.norm()))


@pytest.mark.parametrize("window", [1, 40, 128, 1000])
def test_output_and_gradients(window: int) -> None:
    compare(make_inputs(300), window, [0, 300])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    compare(make_inputs(400), 64, [0, 400], dtype)


@pytest.mark.parametrize("heads, kv_heads, dim", [(1, 1, 32), (6, 2, 64), (2, 2, 128), (4, 1, 256)])
def test_grouped_heads_and_head_sizes(heads: int, kv_heads: int, dim: int) -> None:
    if INTERPRETED and dim > 64:
        pytest.skip("left out of the interpreter's run to save time")
    compare(make_inputs(200, heads, kv_heads, dim), 30, [0, 200])


def test_packed_sequences() -> None:
    """Of one token, of none, of less than a block and of several."""
    compare(make_inputs(330), 33, [0, 1, 1, 45, 173, 330])


def test_long_sequences() -> None:
    """What is left of them does not fit into the part that is listed at once."""
    compare(make_inputs(1300, heads=2, kv_heads=1), 20, [0, 1100, 1300])


def test_next_to_nothing_is_nothing() -> None:
    *inputs, log_kept, grad = (x.to(DEVICE) for x in make_inputs(200))
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32, device=DEVICE)
    log_kept[::3] = 1.001 * GONE
    found, expected = (
        with_gradients(lambda *x: fading_attention(*x, window=30, cu_seqlens=cu_seqlens), [*inputs, kept], grad)
        for kept in (log_kept, log_kept.masked_fill(log_kept < GONE, float("-inf")))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not found[-1][::3].any() and found[-1].any()


@pytest.mark.parametrize("value", [float("-inf"), 0.0])
def test_all_tokens_alike(value: float) -> None:
    """Plain attention in a window, and plain attention."""
    inputs = make_inputs(200)
    inputs[3] = torch.full_like(inputs[3], value)
    cu_seqlens = torch.tensor([0, 200], dtype=torch.int32)
    q, k, v, log_kept, _ = (x.to(DEVICE) for x in inputs)
    out = fading_attention(q, k, v, log_kept, window=50, cu_seqlens=cu_seqlens.to(DEVICE))
    position = torch.arange(200, device=DEVICE)
    back = position[:, None] - position
    seen = (back >= 0) & (back <= 50) if value else back >= 0
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None].double() for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(out.double(), plain, atol=1e-5, rtol=1e-5)


def test_results_repeat_bit_by_bit() -> None:
    *inputs, grad = (x.to(DEVICE) for x in make_inputs(300))
    cu_seqlens = torch.tensor([0, 300], dtype=torch.int32, device=DEVICE)
    once, again = (
        with_gradients(lambda *x: fading_attention(*x, window=40, cu_seqlens=cu_seqlens), inputs, grad)
        for _ in range(2)
    )
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="of PyTorch, not of the kernels")
def test_operator_is_a_good_citizen_of_pytorch() -> None:
    q, k, v, log_kept, grad = (x.to(DEVICE) for x in make_inputs(20))
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v, log_kept)]
    library.opcheck(_forward, (*leaves, cu_seqlens, 5, 0.2))
    tensors = [x.detach() for x in leaves]
    library.opcheck(_backward, (grad, *tensors, *_forward(*tensors, cu_seqlens, 5, 0.2), cu_seqlens, 5, 0.2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (20, 3, 32)}, "must be [N, H, d], [N, KV heads, d] and as k"),
        ({"log_kept": (20, 4)}, "log_kept is [20, 4]: it must be [20, 2]"),
        ({"window": 0}, "window is 0: it must be an integer from 1 on"),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    q, k, v, log_kept, _ = make_inputs(20)
    given = {"q": q, "k": k, "v": v, "log_kept": log_kept}
    given |= {name: torch.zeros(value) for name, value in change.items() if isinstance(value, tuple)}
    window = change.get("window", 5)
    with pytest.raises(ValueError) as error:
        fading_attention(**given, window=window, cu_seqlens=torch.tensor([0, 20]))
    assert message in str(error.value)
