"""Which tokens a layer's KV heads evict, as numbers with gradients: one function for each method."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid, pad
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vllm_fox.families.evicting.config import EvictingDecoderConfig, Eviction


def add_decisions(attention: Any, config: EvictingDecoderConfig, eviction: Eviction) -> None:
    """Give an attention layer the modules that decide, under the names that checkpoints have for them."""
    size, heads = config.hidden_size, config.num_key_value_heads
    if eviction.method == "dms_adapter":
        attention.dms_proj_alpha_norm = LlamaRMSNorm(size, eps=config.rms_norm_eps)
        attention.dms_proj_alpha = nn.Linear(size, heads, bias=eviction.bias)
        # At first all logits are the offset, and nearly nothing is evicted.
        attention.dms_proj_alpha.starts_at_zero = True
    elif eviction.method == "kvzap":
        inner = eviction.hidden_dim
        attention.kvzap = nn.Linear(size, heads)
        if inner is not None:
            attention.kvzap = nn.Sequential(nn.Linear(size, inner), nn.GELU(), nn.Linear(inner, heads))


def decision_logits(
    attention: Any, eviction: Eviction, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor
) -> torch.Tensor:
    """Return what N tokens decide: [N, KV heads] float32 or wider, more than 0 where a token goes.

    Args:
        attention: the layer, with the modules of :func:`add_decisions`.
        x: [N, hidden] the attention's input, which is normed.
        residual: [N, hidden] what it is the norm of.
        q: [N, KV heads, G, d] queries after their norm and before RoPE.
    """
    if eviction.method == "kvzap":
        assert eviction.threshold is not None
        # In training a predictor is wider than the model beside it.
        scores = attention.kvzap(x.to(next(attention.kvzap.parameters()).dtype))
        # A threshold has the scores' dtype, as in kvpress.
        logits = _wide(torch.tensor(eviction.threshold, dtype=scores.dtype, device=x.device)) - _wide(scores)
    else:
        assert eviction.scale is not None and eviction.offset is not None
        if eviction.method == "dms_adapter":
            raw = attention.dms_proj_alpha(attention.dms_proj_alpha_norm(residual))
        else:
            raw = q[:, :, 0, -1]
        logits = _wide(raw) * eviction.scale - eviction.offset
    return logits[:, :1].expand(-1, q.shape[1]) if eviction.decides == "layer" else logits


def about(decided: torch.Tensor, shift: int, last: torch.Tensor, none: float) -> torch.Tensor:
    """Turn what N tokens decide [N, KV heads] into what is decided about each.

    Args:
        shift: 1 if a token decides about the one before it, 0 if about itself.
        last: [N] bool, whether a token is the last one of its sequence.
        none: stands where nothing is decided.
    """
    if not shift:
        return decided
    return torch.where(last[:, None], none, pad(decided[1:], (0, 0, 0, 1)))


def noisy(logits: torch.Tensor) -> torch.Tensor:
    """Add the difference of two Gumbel variables to each logit, with which DMS trains (arXiv 2506.05345)."""
    uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
    return logits + uniform.log() - torch.log1p(-uniform)


def log_kept(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log(1 - p) of the soft decision p = sigmoid(logits / temperature)."""
    return logsigmoid(-logits / temperature)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
