"""Decoders that evict tokens, in float64 with full [T, T] matrices: published checkpoints, read like the papers.

Written from the formulas of Llama, Qwen, DMS (arXiv 2506.05345) and KVzap (arXiv 2601.07891) and the names of their
checkpoints' tensors alone; it shares no code with the vLLM model or the conversion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


def reference_logits(
    folder: Path,
    token_ids: Sequence[int],
    predictor: Path | None = None,
    threshold: float = 0.0,
    window: int = 0,
    *,
    evictions: torch.Tensor | None = None,
    rounded: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token logits of one sequence, and which tokens are evicted.

    Args:
        folder: a checkpoint with DMS as Model-Optimizer saves it, or one to go with the predictor.
        predictor, threshold, window: of KVzap.
        evictions: [layers, KV heads, T] bool, which tokens to evict, if not those that the checkpoint decides.
        rounded: what becomes of inputs [T, ...] of projections, if they are rounded.

    Returns:
        [T, vocab] float64, and [layers, KV heads, T] bool: whether the checkpoint decides that a token is evicted
        when it leaves its window.
    """
    given = json.loads((folder / "config.json").read_text())
    config: Any = AutoConfig.for_model(**given)
    w = _tensors(folder)
    kvzap = _tensors(predictor) if predictor else {}
    ids = torch.as_tensor(token_ids)
    position = torch.arange(len(ids))
    rope = LlamaRotaryEmbedding(config).double()
    cos, sin = (x[0].double() for x in rope(torch.zeros(1, dtype=torch.float64), position[None]))
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    borrowed = "dms_alpha_scale" in given and not given.get("dms_separate_alpha", False)
    x, decisions = w["model.embed_tokens.weight"][ids], []
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"

        def linear(name: str, y: torch.Tensor, layer: str = layer) -> torch.Tensor:
            y = rounded(y) if name.endswith("_proj") else y
            return F.linear(y, w[f"{layer}.{name}.weight"], w.get(f"{layer}.{name}.bias"))

        def norm(name: str, y: torch.Tensor, layer: str = layer) -> torch.Tensor:
            return F.rms_norm(y, y.shape[-1:], w[f"{layer}.{name}.weight"], config.rms_norm_eps)

        residual, x = x, norm("input_layernorm", x)
        q, k, v = (linear(f"self_attn.{part}_proj", x).unflatten(1, (-1, dim)) for part in "qkv")
        if f"{layer}.self_attn.q_norm.weight" in w:
            q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
        first = torch.arange(heads) * groups
        if predictor is not None:
            score = (
                F.linear(x, *_weights(kvzap, f"layers.{n}"))
                if f"layers.{n}.weight" in kvzap
                else F.linear(
                    F.gelu(F.linear(x, *_weights(kvzap, f"layers.{n}.0"))), *_weights(kvzap, f"layers.{n}.2")
                )
            )
            evicted = (score < threshold).T
        else:
            window = given["dms_window_size"]
            if borrowed:
                logit = q[:, first, -1]
            else:
                logit = linear("self_attn.dms_proj_alpha", norm("self_attn.dms_proj_alpha_norm", residual))
            decided = logit * given["dms_alpha_scale"] - given["dms_initial_alpha_offset"] > 0
            if given.get("dms_alpha_per") == "layer":
                decided = decided[:, :1].expand(-1, heads)
            # A token decides about the one before it.
            evicted = torch.cat([decided[1:], torch.zeros(1, heads, dtype=torch.bool)]).T
            if given.get("dms_disable_eviction"):
                evicted = torch.zeros_like(evicted)
        decisions.append(evicted)
        evicted = evicted if evictions is None else evictions[n]
        q = _without_neuron(q, first, borrowed)
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        q = _without_neuron(q, first, borrowed)
        distance = position[:, None] - position
        visible = (distance >= 0) & ((distance <= window) | ~evicted[:, None])
        logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(groups, 1)) / dim**0.5
        weights = logits.masked_fill(~visible.repeat_interleave(groups, 0), float("-inf")).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(groups, 1))
        x = residual + linear("self_attn.o_proj", out.flatten(1))
        y = norm("post_attention_layernorm", x)
        x = x + linear("mlp.down_proj", F.silu(linear("mlp.gate_proj", y)) * linear("mlp.up_proj", y))
    x = F.rms_norm(x, x.shape[-1:], w["model.norm.weight"], config.rms_norm_eps)
    head = w["model.embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return x @ head.T, torch.stack(decisions)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= {name: tensor.double() for name, tensor in load_file(path).items()}
    return found


def _weights(w: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return w[f"{name}.weight"], w[f"{name}.bias"]


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on [T, heads, d], of which the halves are turned together."""
    one, two = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-two, one], -1) * sin[:, None]


def _without_neuron(q: torch.Tensor, first: torch.Tensor, borrowed: bool) -> torch.Tensor:
    """Queries [T, heads, d] without the number that decides, of the first query head of each KV head."""
    if not borrowed:
        return q
    q = q.clone()
    q[:, first, -1] = 0
    return q
