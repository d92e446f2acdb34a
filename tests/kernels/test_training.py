"""forgetting_attention, forward and backward, against the formula in float64: the twin, or the Triton kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from tests.support.gradients import real_tokens
from tests.support.rounding import attention_and_bounds
from vllm_fox.hf import ForgettingTransformerForCausalLM
from vllm_fox.hf.fox import modeling
from vllm_fox.kernels import forgetting_attention
from vllm_fox.kernels.forgetting import training
from vllm_fox.kernels.forgetting.training import _backward, _forward, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NAMES = ("out", "q", "k", "v", "log_forget")


def make_inputs(
    batch: int, length: int, heads: int, kv_heads: int, dim: int, gates: str = "mixed", seed: int = 0
) -> list[torch.Tensor]:
    """q, k, v and log_forget in float32; logits within a few units."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, n, dim, generator=rng) for n in (heads, kv_heads, kv_heads))
    rate = {"mixed": torch.logspace(-4, 0.5, heads), "never": torch.zeros(heads), "all": torch.full((heads,), 40.0)}
    log_forget = -torch.rand(batch, length, heads, generator=rng) * 2 * rate.get(gates, rate["mixed"])
    if gates == "alternating":
        log_forget = torch.where(torch.arange(length)[:, None] % 50 == 0, -60.0, log_forget * 1e-3)
    return [q / 2, k / 2, v, log_forget]


def with_gradients(
    attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], grad_out: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The output and the four gradients, for a gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attend(*leaves)
    if grad_out is None:
        grad_out = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    out.backward(grad_out.to(out))
    return [x.cpu() for x in (out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))]


def compare(
    inputs: list[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    bounds: list[int] | None = None,
    threshold: torch.Tensor | str | None = None,
    grad_out: torch.Tensor | None = None,
) -> None:
    """Output and gradients against the formula's, each number within its rounding bound."""
    rounded = [x.to(dtype) for x in inputs[:3]] + [inputs[3]]
    batch, length, heads, dim = inputs[0].shape
    if grad_out is None:
        grad_out = torch.cos(torch.arange(inputs[0].numel(), dtype=torch.float64)).view(inputs[0].shape)
    grad_out = grad_out.to(dtype)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    bounds = bounds or [n * length for n in range(batch + 1)]
    if isinstance(threshold, torch.Tensor):
        limit = threshold.cpu()
    elif threshold == "auto":
        most = [x.flatten(0, 1).float().norm(dim=-1).amax(0) for x in rounded[:2]]
        longest = max(end - start for start, end in zip(bounds, bounds[1:]))
        bound = most[0] * most[1].repeat_interleave(heads // inputs[1].shape[2]) / math.sqrt(dim)
        limit = -2 * bound - math.log(longest) - 10
    else:
        limit = torch.full((heads,), -math.inf)

    def ours(*leaves: torch.Tensor) -> torch.Tensor:
        return forgetting_attention(*leaves, cu_seqlens=cu_seqlens, threshold=threshold)

    found = with_gradients(ours, [x.to(DEVICE) for x in rounded], grad_out)
    lines = [x.flatten(0, 1) for x in (*rounded, grad_out)]
    want, allowed = attention_and_bounds(*lines, bounds, limit)
    for name, a, b, most_off in zip(NAMES, found, want, allowed, strict=True):
        excess = ((a.flatten(0, 1).double() - b).abs() / most_off.clamp(min=1e-300)).max().item()
        assert excess <= 1, (name, excess)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gates", ["mixed", "never", "alternating"])
def test_output_and_gradients(gates: str, dtype: torch.dtype) -> None:
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    compare(make_inputs(2, 200, 2, 2, 64, gates), dtype)


@pytest.mark.parametrize("kv_heads, dim", [(1, 32), (2, 128), (4, 256)])
def test_grouped_heads_and_head_sizes(kv_heads: int, dim: int) -> None:
    compare(make_inputs(1, 150, 4, kv_heads, dim))


def test_packed_sequences() -> None:
    """Of any lengths, empty ones too; each as if it were alone."""
    compare(make_inputs(1, 300, 2, 1, 32), bounds=[0, 0, 1, 130, 300, 300])


@pytest.fixture(scope="module")
def trained_inputs(fox_tiny: Path) -> list[list[torch.Tensor]]:
    """q, k, v, log_forget and the output's gradient in each layer of a trained model, for its loss on real text."""
    found: list[list[torch.Tensor]] = []

    def record(*leaves: torch.Tensor, **options: Any) -> torch.Tensor:
        out = forgetting_attention(*leaves, **options)
        mine = [x.detach() for x in leaves]
        # Scaled as losses are in float16, in which small gradients would underflow.
        out.register_hook(lambda grad: found.append([*mine, grad * 1024]))
        return out

    model = ForgettingTransformerForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32).train()
    ids = real_tokens(fox_tiny, 260 if INTERPRETED else 700)[None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling, "forgetting_attention", record)
        if INTERPRETED:  # the twin gives as good inputs, and the interpreter is slow
            patch.setattr(training, "use_triton", lambda device: False)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [None, "auto"])
def test_gradients_of_a_real_loss(
    trained_inputs: list[list[torch.Tensor]], threshold: str | None, dtype: torch.dtype
) -> None:
    """They nearly cancel, where those of random numbers are large and hide what is lost."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 dot product")
    for *inputs, grad_out in trained_inputs[:1] if INTERPRETED else trained_inputs:
        compare(inputs, dtype, threshold=threshold, grad_out=grad_out)
        compare(inputs, dtype, bounds=[0, 1, 150, grad_out.shape[1]], threshold=threshold, grad_out=grad_out)


def test_everything_forgotten_at_once() -> None:
    """Each token sees itself alone: gates have no gradient, and q and k none worth speaking of."""
    inputs = [x.to(DEVICE) for x in make_inputs(1, 100, 2, 2, 32, "all")]
    inputs[3] = torch.full_like(inputs[3], -math.inf)
    out, *grads = with_gradients(forgetting_attention, inputs)
    assert torch.equal(out, inputs[2].cpu())
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert grads[3].abs().max() < 1e-5


@pytest.mark.parametrize("gates", ["mixed", "alternating"])
def test_pruning_changes_nothing_that_counts(gates: str) -> None:
    """By ACP's own rule, and with a threshold a head."""
    inputs = make_inputs(1, 700, 2, 1, 32, gates)
    compare(inputs, threshold="auto")
    compare(inputs, threshold=torch.tensor([-80.0, -30.0], device=DEVICE))


def test_what_is_forgotten_is_not_read() -> None:
    """Keys that a query has forgotten may be NaN."""
    q, k, v, log_forget = (x.to(DEVICE) for x in make_inputs(1, 1300, 1, 1, 32))
    log_forget[:] = -1e-3
    log_forget[:, 640] = -200.0
    late = slice(1024, None)
    want = forgetting_attention(q, k, v, log_forget, threshold=-100.0)
    k[:, :512], v[:, :512] = math.nan, math.nan
    leaves = [x.requires_grad_() for x in (q, k, v, log_forget)]
    found = forgetting_attention(*leaves, threshold=-100.0)
    torch.testing.assert_close(found[:, late], want[:, late])
    grads = torch.autograd.grad(found, leaves[:3], torch.ones_like(found))
    assert all(torch.isfinite(grad[:, late]).all() for grad in grads)


def test_who_has_forgotten_a_key_is_not_read_for_its_gradient() -> None:
    """Gradients that arrive at late tokens may be NaN: keys that those have forgotten do not see them."""
    q, k, v, log_forget = (x.to(DEVICE) for x in make_inputs(1, 1300, 1, 1, 32))
    log_forget[:] = -1e-3
    log_forget[:, 640] = -200.0
    leaves = [x.requires_grad_() for x in (k, v)]
    out = forgetting_attention(q, *leaves, log_forget, threshold=-100.0)
    arriving = torch.ones_like(out)
    arriving[:, 1024:] = math.nan
    for grad in torch.autograd.grad(out, leaves, arriving):
        assert torch.isfinite(grad[:, :512]).all() and grad[:, 1024:].isnan().any()


def test_results_repeat_bit_by_bit() -> None:
    inputs = [x.to(DEVICE) for x in make_inputs(1, 300, 2, 1, 32)]
    first, second = (with_gradients(forgetting_attention, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operator_is_a_good_citizen_of_pytorch() -> None:
    """Schema, fake implementation, autograd registration; and no graph break under torch.compile."""
    q, k, v, log_forget = (x.to(DEVICE) for x in make_inputs(1, 40, 2, 1, 32))
    bounds = torch.tensor([0, 15, 40], dtype=torch.int32, device=DEVICE)
    leaves = [x[0].clone().requires_grad_() for x in (q, k, v, log_forget)]
    limits = bounds, torch.full((2,), -math.inf, device=DEVICE), 0.2
    library.opcheck(_forward, (*leaves, *limits))
    with torch.no_grad():
        saved = _forward(*leaves, *limits)
    given = [x.detach() for x in (saved[0], *leaves[:3], *saved)]
    library.opcheck(_backward, (*given, *limits))
    compiled = torch.compile(
        lambda *x: forgetting_attention(*x, threshold="auto").square(), fullgraph=True, backend="aot_eager"
    )
    inputs = [q, k, v, log_forget]
    plain = with_gradients(lambda *x: forgetting_attention(*x, threshold="auto").square(), inputs)
    for a, b in zip(with_gradients(compiled, inputs), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(INTERPRETED, reason="float64 runs the twin")
def test_twin_in_float64() -> None:
    """Its gradients against finite differences of its output."""
    inputs = [x.double().requires_grad_() for x in make_inputs(1, 12, 2, 1, 32)]
    assert torch.autograd.gradcheck(forgetting_attention, inputs)


def planners() -> list[Any]:
    """The plan in plain PyTorch, and where Triton runs, in Triton."""
    if DEVICE == "cpu" and not INTERPRETED:
        return [plan]
    from vllm_fox.kernels.forgetting.training import plan_kernel

    return [plan, plan_kernel]


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4).filter(any),
    rate=st.sampled_from([0.0, 0.05, 1.0, 30.0]),
    threshold=st.sampled_from([-math.inf, -50.0, -5.0]),
    size=st.sampled_from([16, 32]),
    block=st.sampled_from([8, 16]),
    kv_heads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_plan_visits_all_that_lives_and_little_else(
    lengths: list[int], rate: float, threshold: float, size: int, block: int, kv_heads: int, seed: int
) -> None:
    """A tile's limit is the block of the last pair that lives, and tiles with more work come first."""
    rng = torch.Generator().manual_seed(seed)
    log_forget = -torch.rand(sum(lengths), 2, generator=rng) * rate
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    c = log_forget.double().cumsum(0).T
    for planner in planners():
        given = (
            planner.running_sum(log_forget.to(DEVICE), bounds.to(DEVICE)),
            bounds.to(DEVICE),
            torch.full((2,), threshold, device=DEVICE),
            size,
            block,
        )
        for tiles, by_query in (
            (planner.query_tiles(*given), True),
            (planner.key_tiles(*given, kv_heads), False),
        ):
            seen, work = 0, torch.zeros(2, len(tiles.bounds), dtype=torch.int64)
            for tile, (start, begin, end) in enumerate(tiles.bounds.tolist()):
                if start == end:
                    continue
                assert begin in bounds and end in bounds and (start - begin) % size == 0
                seen += min(size, end - start)
                rows = torch.arange(start, min(start + size, end))
                others = torch.arange(begin, end)
                for head in range(2):
                    i, j = (rows[:, None], others[None]) if by_query else (others[None], rows[:, None])
                    live = (j <= i) & (c[head, i] - c[head, j] >= threshold)
                    blocks = (others - begin)[live.any(0)] // block
                    edge = blocks.min() if by_query else blocks.max()
                    assert tiles.limit[head, tile] == edge
                    own = (rows - begin).max() // block if by_query else (start - begin) // block
                    work[head, tile] = (own - edge).abs() + 1
            assert seen == sum(lengths)
            if not by_query:
                work = work.unflatten(0, (kv_heads, -1)).sum(1)
            sorted_work = work.flatten()[tiles.order.cpu()]
            assert (sorted_work.diff() <= 0).all() and len(set(tiles.order.tolist())) == work.numel()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(1, 5, 2, 48)}, r"q is \[1, 5, 2, 48\]: it must be \[B, T, H, d\] with d of 32"),
        ({"k": torch.zeros(1, 5, 3, 32)}, r"k is \[1, 5, 3, 32\]: .* KV heads a divisor of 2"),
        (
            {"v": torch.zeros(1, 5, 2, 32, dtype=torch.float16)},
            "v is torch.float16: it must be torch.float32, as q",
        ),
        ({"log_forget": torch.zeros(1, 5, 1)}, r"log_forget is \[1, 5, 1\]: it must be \[1, 5, 2\]"),
        ({"threshold": "always"}, "threshold is 'always'"),
        ({"threshold": torch.zeros(3)}, r"threshold is \[3\]: it must be \[2\]"),
        ({"cu_seqlens": torch.zeros(3)}, "cu_seqlens is torch.float32"),
    ],
)
def test_wrong_inputs_are_named(change: dict, message: str) -> None:
    good = {name: torch.zeros(1, 5, 2, 32) for name in "qkv"} | {"log_forget": torch.zeros(1, 5, 2)}
    with pytest.raises(ValueError, match=message):
        forgetting_attention(**good | change)
