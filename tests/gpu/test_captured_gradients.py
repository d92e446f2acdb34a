"""Gradients that are captured in a CUDA graph: they are what is computed without the capture, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_distillation import Distillation
from captured_gradients import CapturedGradients

from tests.support.checkpoints import VARIANTS as FOX_VARIANTS
from tests.support.checkpoints import make_checkpoint
from tests.support.evicting import VARIANTS, make_evicting
from vllm_fox.hf import EvictingDecoderForCausalLM, ForgettingTransformerForCausalLM, compile_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SHARES = (0.0, 0.3, 0.6)
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def retrofit(folder: Path) -> tuple[torch.nn.Module, Loss]:
    """Adapters that learn to evict a share of the tokens, with noise."""
    made = make_evicting(folder, VARIANTS["llama-adapter"])
    model: Any = EvictingDecoderForCausalLM.from_pretrained(made.served, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        weight.requires_grad_("dms_proj" in name)
    learner = Distillation(model, 1.0, compiled=True)
    return learner, learner


def pretraining(folder: Path, checkpointing: bool = False) -> tuple[torch.nn.Module, Loss]:
    """A Forgetting Transformer, with pruning."""
    checkpoint = make_checkpoint(folder, **FOX_VARIANTS["pro"])
    model: Any = ForgettingTransformerForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if checkpointing:  # as examples/train_fox.py asks for it
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})

    def loss_of(ids: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return model, loss_of


def checkpointed(folder: Path) -> tuple[torch.nn.Module, Loss]:
    """The same, whose layers are computed a second time in the backward pass."""
    return pretraining(folder, checkpointing=True)


def losses_and_gradients(
    made: tuple[torch.nn.Module, Loss], captured: bool
) -> tuple[list[float], list[torch.Tensor]]:
    """Of steps of two batches each, at a rising share; the gradients after each step are those of all weights."""
    model, loss_of = made
    model.cuda().train()
    compile_layers(model)

    def backward(ids: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(ids, share)
        loss.backward()
        return loss.detach()

    gradients = CapturedGradients(backward, model.parameters()) if captured else backward
    order = torch.Generator().manual_seed(0)
    losses, found = list[float](), list[torch.Tensor]()
    for step, share in enumerate(SHARES):
        for piece in range(2):
            ids = torch.randint(1, 200, (2, 700), generator=order).cuda()
            torch.manual_seed(10 * step + piece)  # of the decisions' noise
            losses.append(float(gradients(ids, torch.full((), share, device="cuda"))))
        found.append(torch.cat([w.grad.flatten().clone() for w in model.parameters() if w.grad is not None]))
        model.zero_grad(set_to_none=not captured)
    return losses, found


@pytest.mark.parametrize("make", [retrofit, pretraining, checkpointed])
def test_captured_gradients_are_the_same_bit_by_bit(
    make: Callable[[Path], tuple[torch.nn.Module, Loss]], tmp_path: Path
) -> None:
    """Of several steps and batches a step."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # as the training scripts do
    try:
        (plain, expected), (captured, gradients) = (
            losses_and_gradients(make(tmp_path / str(how)), how) for how in (False, True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(plain)) == len(plain)
    assert captured == plain
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.abs().max() > 0
        assert torch.equal(ours, theirs)
