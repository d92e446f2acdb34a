"""FoX in float64 with full [T, T] matrices: the formulas of arXiv 2503.02130, read like the paper.

Written from the formulas and the two dialects' tensor names alone; it shares no code with the vLLM model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoConfig

from vllm_fox.registration import register_configs


def load(model_dir: str | Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The config and the tensors (float64) of a checkpoint folder, sharded or not."""
    register_configs()
    folder = Path(model_dir)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors |= {name: shard.get_tensor(name).double() for name in shard.keys()}  # noqa: SIM118
    return AutoConfig.from_pretrained(folder), tensors


def reference_logits(
    model: str | Path | tuple[Any, Mapping[str, torch.Tensor]], token_ids: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Next-token logits of one sequence.

    Args:
        model: a checkpoint folder, or a config and its tensors.
        token_ids: [T].

    Returns:
        [T, vocab] float64.
    """
    config, tensors = load(model) if isinstance(model, (str, Path)) else model
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["model.embeddings.weight"][torch.as_tensor(token_ids)]
    for n in range(config.num_hidden_layers):
        layer = {
            name.removeprefix(f"model.layers.{n}."): t for name, t in w.items() if f"model.layers.{n}." in name
        }
        x = x + attention(config, layer, rms_norm(x, layer["attn_norm.weight"], config.norm_eps))
        x = x + mlp(config, layer, rms_norm(x, layer["mlp_norm.weight"], config.norm_eps))
    x = rms_norm(x, w["model.norm.weight"], config.norm_eps)
    head = w["model.embeddings.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return x @ head.T


def attention(config: Any, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """One layer's forgetting attention, [T, hidden] to [T, hidden]."""
    official = config.model_type == "forgetting_transformer-project_fox"
    length, heads = len(x), config.num_heads
    kv_heads = config.num_kv_heads or heads
    dim = config.hidden_size // heads

    def project(name: str, count: int) -> torch.Tensor:
        shifted = f"attn.{name}_proj.linear.weight"
        y = x @ w[shifted if shifted in w else f"attn.{name}_proj.weight"].T
        if f"attn.{name}_proj.bias" in w:
            y = y + w[f"attn.{name}_proj.bias"]
        y = y.view(length, count, dim)
        if f"attn.{name}_proj.shift_proj.weight" in w:
            a = torch.sigmoid(x @ w[f"attn.{name}_proj.shift_proj.weight"].T)[:, :, None]
            previous = torch.cat((torch.zeros(1, count, dim, dtype=y.dtype), y[:-1]))
            y = a * previous + (1 - a) * y
        return y

    q, k, v = project("q", heads), project("k", kv_heads), project("v", kv_heads)
    if config.qk_norm:
        shared = official and config.qk_norm_share_param_across_head
        q = rms_norm(q, w["attn.q_norm.weight"].view(1 if shared else heads, dim), 1e-5)
        k = rms_norm(k, w["attn.k_norm.weight"].view(1 if shared else kv_heads, dim), 1e-5)
    if official and config.use_rope:
        q, k = rotary(q, config.rope_base), rotary(k, config.rope_base)
    k = k.repeat_interleave(heads // kv_heads, dim=1)
    v = v.repeat_interleave(heads // kv_heads, dim=1)

    c = log_forget(config, w, x).cumsum(0)  # [T, heads], c_t = sum over s <= t of log f_s
    out = torch.empty(length, heads, dim, dtype=torch.float64)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for h in range(heads):
        logits = q[:, h] @ k[:, h].T / math.sqrt(dim) + (c[:, None, h] - c[None, :, h])
        out[:, h] = logits.masked_fill(future, -math.inf).softmax(-1) @ v[:, h]

    if official and config.use_output_norm:
        out = rms_norm(out, w["attn.output_norm.weight"].view(heads, dim), config.norm_eps)
    out = out.reshape(length, heads * dim)
    if config.use_output_gate:
        gate = x @ w["attn.ogate_proj.weight" if official else "attn.g_proj.weight"].T
        silu = official and config.ogate_act == "silu"
        out = out * (F.silu(gate) if silu else torch.sigmoid(gate))
    return out @ w["attn.o_proj.weight"].T


def log_forget(config: Any, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """log f_t = log sigmoid(w_f . x_t + b_f) of every head: [T, heads]."""
    kind = getattr(config, "fgate_type", "full")
    if kind == "none":
        return torch.zeros(len(x), config.num_heads, dtype=torch.float64)
    if kind in ("bias_only", "fixed"):
        return F.logsigmoid(w["attn.fgate_bias"]).expand(len(x), -1)
    name = "attn.fgate_proj" if "attn.fgate_proj.weight" in w else "attn.f_proj"
    return F.logsigmoid(x @ w[f"{name}.weight"].T + w[f"{name}.bias"])


def mlp(config: Any, w: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """down(act(gate x) * up x)."""
    if "mlp.up_proj.weight" in w:
        gate, up = w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]
    else:
        gate, up = w["mlp.gate_proj.weight"].chunk(2)
    act = torch.sigmoid if config.hidden_act == "sigmoid" else F.silu
    return (act(x @ gate.T) * (x @ up.T)) @ w["mlp.down_proj.weight"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotary(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotate the pairs (i, i + d/2) of [T, H, d] at position t by t * base^(-2i/d)."""
    length, _, dim = x.shape
    angle = torch.outer(torch.arange(length).double(), base ** (-torch.arange(0, dim, 2).double() / dim))[:, None]
    turn = torch.polar(torch.ones_like(angle), angle)
    turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)
