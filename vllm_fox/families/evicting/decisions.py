"""Which tokens the KV heads of a layer evict: one class for each method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_fox.modules.heads import HeadShare

from .config import EvictingDecoderConfig, Eviction


class Decisions(nn.Module, ABC):
    """What tokens decide, of T tokens and the H KV heads of this rank, each with G query heads of size d.

    Attributes:
        borrows_neuron: whether the decision is a number of the query, which attention then does not read.
    """

    borrows_neuron: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """Decide.

        Args:
            x: [T, hidden] the attention's input, which is normed.
            residual: [T, hidden] what it is the norm of.
            q: [T, H, G, d] queries after their norm and before RoPE.

        Returns:
            [T, H] bool: whether a token is evicted; [T, 1] if one decision is for all heads.
        """


class BorrowedNeuron(Decisions):
    """DMS (arXiv 2506.05345) whose logit is the last number of the group's first query."""

    borrows_neuron = True

    def __init__(self, deciding: int, scale: float, offset: float) -> None:
        super().__init__()
        self.deciding, self.scale, self.offset = deciding, scale, offset

    def forward(self, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return q[:, : self.deciding, 0, -1].float() * self.scale - self.offset > 0


class AlphaAdapter(Decisions):
    """DMS whose logit is a projection of the normed residual stream.

    The names of its parts are those of the published checkpoints.
    """

    def __init__(
        self, hidden_size: int, heads: HeadShare, eps: float, bias: bool, scale: float, offset: float
    ) -> None:
        super().__init__()
        self.scale, self.offset = scale, offset
        self.dms_proj_alpha_norm = RMSNorm(hidden_size, eps=eps)
        self.dms_proj_alpha = HeadRows(hidden_size, heads, bias)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return self.dms_proj_alpha(self.dms_proj_alpha_norm(residual)).float() * self.scale - self.offset > 0


class ScorePredictor(Decisions):
    """KVzap (arXiv 2601.07891): a linear function or a small MLP predicts how much a token will matter."""

    def __init__(self, hidden_size: int, heads: HeadShare, hidden_dim: int | None, threshold: float) -> None:
        super().__init__()
        # Scores have the model's dtype, and so has the threshold that they are compared with, as in kvpress.
        self.threshold = torch.tensor(threshold, dtype=torch.get_default_dtype()).item()
        rows = HeadRows(hidden_dim or hidden_size, heads, bias=True)
        # The published predictors use the exact form of GELU.
        self.kvzap = (
            rows if hidden_dim is None else nn.Sequential(nn.Linear(hidden_size, hidden_dim), nn.GELU(), rows)
        )

    def forward(self, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return self.kvzap(x).float() < self.threshold


class HeadRows(nn.Module):
    """A linear layer with a number for each KV head, of which a rank has those of its heads."""

    def __init__(self, size: int, heads: HeadShare, bias: bool) -> None:
        super().__init__()
        self.weight = heads.parameter(size)
        self.bias = heads.parameter() if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [T, size] to [T, heads of the rank]."""
        return nn.functional.linear(x, self.weight, self.bias)


def make_decisions(config: EvictingDecoderConfig, heads: HeadShare) -> Decisions:
    """The decisions of a layer, for the KV heads of this rank."""
    eviction, size = Eviction.from_dict(config.eviction), config.hidden_size
    if eviction.decides == "layer":
        heads = HeadShare(heads.total, [0])
    if eviction.method == "kvzap":
        assert eviction.threshold is not None
        return ScorePredictor(size, heads, eviction.hidden_dim, eviction.threshold)
    assert eviction.scale is not None and eviction.offset is not None
    if eviction.method == "dms_adapter":
        return AlphaAdapter(size, heads, config.rms_norm_eps, eviction.bias, eviction.scale, eviction.offset)
    return BorrowedNeuron(heads.count, eviction.scale, eviction.offset)
