"""How adapters learn to evict: from the same model without eviction (DMS, arXiv 2506.05345)."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vllm_fox.hf import EvictingDecoderForCausalLM

TOKENS_AT_ONCE = 1024  # whose logits are in memory together
FIRMNESS = 200.0
"""Weight of the square of a missed share. Where 2 points are missing, the next costs about 0.09 nats a token; the
first term alone would cost 0.01."""


def wanted_share(step: int, args: argparse.Namespace) -> float:
    """The share of tokens to evict: that of a ratio which rises from 1 to --ratio."""
    ratio = 1 + (args.ratio - 1) * min(1.0, (step + 1) / args.ramp)
    return 1 - 1 / ratio


class Distillation(nn.Module):
    """A model that evicts, and learns what the same model without eviction answers.

    Its output in training is the loss: the mean divergence KL(teacher || student) of the next token's distribution,
    plus ``budget * (missing + FIRMNESS * missing**2)`` where ``missing`` is what is missing to the share that is to
    be evicted. The published loss has the first term alone, without the square.
    """

    def __init__(self, model: EvictingDecoderForCausalLM, budget: float) -> None:
        super().__init__()
        self.model: Any = model
        self.budget = budget

    def forward(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        """Return the loss of windows [B, T], given the share of tokens to evict."""
        mean, evicted = divergence(self.model, ids)
        missing = (share - evicted.mean()).clamp(min=0.0)
        return mean + self.budget * (missing + FIRMNESS * missing.square())


def divergence(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(without eviction || with it) and the evicted share [layers].

    The divergence is the mean over the tokens of windows [B, T]. Eviction is on afterwards.
    """
    with torch.no_grad():
        model.set_evicts(False)
        teacher = model.model(ids).last_hidden_state
    model.set_evicts(True)
    outputs = model.model(ids)
    total = torch.zeros((), device=ids.device)
    pairs = zip(
        teacher.flatten(0, 1).split(TOKENS_AT_ONCE),
        outputs.last_hidden_state.flatten(0, 1).split(TOKENS_AT_ONCE),
        strict=True,
    )
    for theirs, ours in pairs:
        total = total + checkpoint(_divergence, model.lm_head, theirs, ours, use_reentrant=False)
    return total / ids.numel(), outputs.evicted


def _divergence(lm_head: nn.Module, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Return the sum of KL(teacher || student) over hidden states [n, hidden]."""
    theirs, ours = (lm_head(x).float().log_softmax(-1) for x in (teacher, student))
    return (theirs.exp() * (theirs - ours)).sum()
