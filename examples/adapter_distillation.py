"""How adapters learn to evict: from the same model without eviction (DMS, arXiv 2506.05345)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_fox.hf import EvictingDecoderForCausalLM

TOKENS_AT_ONCE = 1024  # whose logits are in memory together
FIRMNESS = 200.0
"""Weight of the square of a missed share. Where 2 points are missing, the next costs about 0.09 nats a token; the
first term alone would cost 0.01."""
CLEARNESS = 0.01
"""Weight of the logits' excess, which the model's output has. Decisions that are surer give no gradient, so heads
that keep or evict everything would never change again."""


def wanted_share(step: int, args: argparse.Namespace) -> float:
    """The share of tokens to evict: that of a ratio which rises from 1 to --ratio."""
    ratio = 1 + (args.ratio - 1) * min(1.0, (step + 1) / args.ramp)
    return 1 - 1 / ratio


def compare(teacher: torch.Tensor, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of KL(teacher || student) over logits [n, vocabulary], and its gradient by the student's."""
    theirs, ours = (x.float().log_softmax(-1) for x in (teacher, student))
    expected = theirs.exp()
    return (expected * (theirs - ours)).sum(), (ours.exp() - expected).to(student.dtype)


Compare = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Distillation(nn.Module):
    """A model that evicts, and learns what the same model without eviction answers.

    Its output in training is the loss: the mean divergence KL(teacher || student) of the next token's distribution,
    plus ``budget * (missing + FIRMNESS * missing**2)`` where ``missing`` is what is missing to the share that is to
    be evicted, plus ``CLEARNESS`` times the mean excess of the decisions' logits. The published loss has neither
    the square nor the excess.

    Args:
        compiled: whether torch.compile makes one kernel of what compares the distributions.
    """

    def __init__(self, model: EvictingDecoderForCausalLM, budget: float, compiled: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.budget = budget
        self._compare: Compare = torch.compile(compare, dynamic=False) if compiled else compare

    def forward(self, ids: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Return the loss of windows [B, T], given the share of tokens to evict, a number."""
        mean, evicted, excess = divergence(self.model, ids, self._compare)
        missing = (share - evicted.mean()).clamp(min=0.0)
        return mean + self.budget * (missing + FIRMNESS * missing.square()) + CLEARNESS * excess.mean()


def divergence(
    model: Any, ids: torch.Tensor, comparison: Compare = compare
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return KL(without eviction || with it), the evicted share [layers] and the logits' excess [layers].

    The divergence is the mean over the tokens of windows [B, T]. Eviction is on afterwards.

    Args:
        comparison: :func:`compare`, or what torch.compile has made of it.
    """
    with torch.no_grad():
        model.set_evicts(False)
        teacher = model.model(ids).last_hidden_state
    model.set_evicts(True)
    outputs = model.model(ids)
    states = (x.flatten(0, 1) for x in (teacher, outputs.last_hidden_state))
    total = _Divergence.apply(model.lm_head.weight, *states, comparison)
    return total / ids.numel(), outputs.evicted, outputs.excess


class _Divergence(torch.autograd.Function):
    """The sum of KL(teacher || student) of the next token's distributions, given hidden states [n, hidden].

    What the student's states contribute to it is computed in the forward pass, so that each logit is computed once
    and those of TOKENS_AT_ONCE tokens are in memory together.
    """

    @staticmethod
    def forward(
        ctx: Any, head: torch.Tensor, teacher: torch.Tensor, student: torch.Tensor, comparison: Compare
    ) -> torch.Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        parts = (x.split(TOKENS_AT_ONCE) for x in (teacher, student, gradient))
        for theirs, ours, into in zip(*parts, strict=True):
            found, difference = comparison(*((x.to(head.dtype) @ head.T) for x in (theirs, ours)))
            total += found
            if ctx.needs_input_grad[2]:
                into.copy_(difference @ head)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[None, None, torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, None, gradient * outer.to(gradient.dtype), None
