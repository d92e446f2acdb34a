"""Training on a GPU: gradients of a trained model on long real text, and what a step waits for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gradients import assert_near_float32, bound, real_tokens
from vllm_fox.hf import ForgettingTransformerForCausalLM, compile_layers
from vllm_fox.hf.fused import fuses
from vllm_fox.hf.loss import MIN_ROWS, linear_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PACKED = (0, 5000, 5001, 21000, 65536)


@pytest.mark.parametrize(
    "options",
    [{}, {"compiled": True}, {"weights": torch.bfloat16}, {"cu_seqlens": torch.tensor(PACKED, dtype=torch.int32)}],
    ids=["autocast", "compiled", "bfloat16 weights", "packed"],
)
def test_gradients_of_a_trained_model_in_bfloat16(fox_tiny: Path, options: dict[str, Any]) -> None:
    """Windows of 16,384 tokens, or as many packed into one row."""
    ids = real_tokens(fox_tiny, 65536).cuda()
    assert_near_float32(fox_tiny, ids[None] if "cu_seqlens" in options else ids.view(4, -1), **options)


BOUNDS = torch.tensor([0, 5000, 5001, 21000, 32768], dtype=torch.int32)
WAITS: dict[str, tuple[dict[str, Any], int]] = {
    "windows": ({}, 0),
    "packed with bounds": (
        {"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS, "max_length_q": 15999, "max_length_k": 15999}, 0,
    ),
    "packed by positions": (
        {"position_ids": torch.cat([torch.arange(n) for n in BOUNDS.diff().tolist()])[None]}, 1,
    ),
    "padded": ({"attention_mask": (torch.arange(32768) > 99)[None].long()}, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", WAITS)
def test_how_often_a_step_waits_for_the_gpu(fox_tiny: Path, case: str) -> None:
    """PyTorch warns of whatever waits."""
    given, count = WAITS[case]
    given = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    model: Any = ForgettingTransformerForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    model.cuda().train()
    ids = real_tokens(fox_tiny, 32768).cuda()[None]

    def step() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, **given).loss
        loss.backward()

    step()  # compiles kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(one.message) for one in seen if "synchronizing" in str(one.message)]
    assert len(waits) == count, waits


def test_wrong_positions_are_named_without_gradients(fox_tiny: Path) -> None:
    """With them the device would end the process."""
    model: Any = ForgettingTransformerForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    model.cuda()
    ids = real_tokens(fox_tiny, 64).cuda()[None]
    backwards = torch.arange(63, -1, -1, device="cuda")[None]
    with torch.no_grad(), pytest.raises(ValueError, match="position_ids has 63 at a token whose number is 0"):
        model(input_ids=ids, position_ids=backwards)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16 weights"])
def test_fused_and_plain_layers_have_the_gradients_of_float64(fox_tiny: Path, weights: torch.dtype) -> None:
    """Layers in evaluation mode compute in plain PyTorch, whatever the loss does, and so does float64."""
    ids = real_tokens(fox_tiny, 4096).cuda().view(2, -1)

    def gradients(dtype: torch.dtype, fused: bool) -> tuple[float, torch.Tensor]:
        model: Any = ForgettingTransformerForCausalLM.from_pretrained(fox_tiny, dtype=dtype)
        model.cuda().train()
        model.model.train(fused)
        assert fuses(model.model.norm, model.model.norm.weight) == (fused and dtype != torch.float64)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), torch.cat([weight.grad.double().flatten() for weight in model.parameters()])

    exact, want = gradients(torch.float64, True)
    allowed = bound(4, torch.bfloat16)
    for fused in (True, False):
        loss, found = gradients(weights, fused)
        distance = ((found - want).norm() / want.norm()).item()
        print(f"fused {fused}: loss {loss:.6f} of {exact:.6f}, gradients {distance:.4f}, allowed {allowed:.4f}")
        assert distance <= allowed
        assert abs(loss - exact) <= allowed * exact


def test_fused_layers_in_float32(fox_tiny: Path) -> None:
    """Without bfloat16's roundings a fault of a fused form would show at once."""
    ids = real_tokens(fox_tiny, 2048).cuda()[None]
    found = []
    for dtype in (torch.float32, torch.float64):
        model: Any = ForgettingTransformerForCausalLM.from_pretrained(fox_tiny, dtype=dtype)
        model.cuda().train()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(torch.cat([weight.grad.double().flatten() for weight in model.parameters()]))
    distance = ((found[0] - found[1]).norm() / found[1].norm()).item()
    # Attention's kernels multiply float32 by TF32 or better.
    assert distance <= bound(4, torch.float32) * 2**13


def test_a_layer_is_one_graph_that_reads_its_input_once(fox_tiny: Path) -> None:
    """Counted as torch.compile traces a layer: the PyTorch of a machine with a GPU may trace otherwise than that of
    a CPU build."""
    model: Any = ForgettingTransformerForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32)
    model.cuda().train()
    counts = list[int]()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        # A function with a backward pass of its own is a graph within the graph, and so is that backward pass.
        traced = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        called = [str(node.target) for part in traced for node in part.graph.nodes if node.op == "call_function"]
        counts.append(sum("linear" in name for name in called))
        return graph.forward

    torch._dynamo.reset()
    compile_layers(model, backend=backend)
    ids = real_tokens(fox_tiny, 64).cuda()[None]
    model(input_ids=ids, labels=ids)
    torch._dynamo.reset()
    # One graph for all layers. To queries, keys, values and gates; of the attention's output; to gate and up; down.
    assert counts == [4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_head_is_added_up_in_float32(dtype: torch.dtype) -> None:
    """Over blocks of tokens, by products that add to it."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5 * MIN_ROWS + 77, 64, generator=draw).to("cuda", dtype)
    weight = (torch.randn(128, 64, generator=draw) / 8).to("cuda", dtype)
    labels = torch.randint(0, 128, (len(hidden),), generator=draw).cuda()
    found = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, found, labels).backward()
    want = weight.double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ want.T, labels, reduction="sum").backward()
    assert found.grad is not None and want.grad is not None
    distance = ((found.grad.double() - want.grad).norm() / want.grad.norm()).item()
    # Rounding at the end deviates by u / sqrt(3) or less. What was rounded before, logits and their gradients, does
    # not show in sums over thousands of tokens. Blocks that are rounded by themselves would: 0.66 u.
    assert distance <= torch.finfo(dtype).eps / 2 / 3**0.5
