"""The Forgetting Transformer (FoX, arXiv 2503.02130) as a transformers model.

Modules are named like the tensors of a checkpoint in its own dialect, so loading and saving need no renaming.
Between the embeddings and the head, all tokens of a batch form one line: sequence after sequence, without padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from vllm_fox.families.fox.architecture import OFFICIAL, Architecture
from vllm_fox.families.fox.bounds import projection_bound, qk_norm_bound, with_rounding
from vllm_fox.families.fox.config import FlaForgettingTransformerConfig, FoxConfig
from vllm_fox.hf.fused import fused, fuses, recomputed
from vllm_fox.hf.gated import can_project, gated, projected
from vllm_fox.hf.generation import PackingGenerationMixin
from vllm_fox.hf.joint import joint, side_by_side
from vllm_fox.hf.line import Line
from vllm_fox.hf.line_model import LineForCausalLM, LineModelMixin
from vllm_fox.kernels import forgetting_attention
from vllm_fox.kernels.acp import pruning_threshold
from vllm_fox.kernels.rope import rotate

from .cache import ForgettingCache
from .norm import RMSNorm, add_norm

logger = logging.get_logger(__name__)


class ShiftedLinear(nn.Module):
    """A projection whose heads mix in the token before: ``a prev + (1 - a) cur`` with a = sigmoid(shift(x))."""

    def __init__(self, hidden: int, heads: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, heads * dim, bias=False)
        self.shift_proj = nn.Linear(hidden, heads, bias=False)


class ForgettingSelfAttention(nn.Module):
    """Projections, gates and norms around forgetting attention."""

    q_norm: RMSNorm
    k_norm: RMSNorm
    output_norm: RMSNorm

    def __init__(self, arch: Architecture, max_length: int, layer: int) -> None:
        super().__init__()
        self.arch, self.layer, self.max_length = arch, layer, max_length
        hidden, dim, heads, kv_heads = arch.hidden_size, arch.head_dim, arch.num_heads, arch.num_kv_heads
        self.q_proj = nn.Linear(hidden, hidden, bias=arch.qkv_bias)
        self.k_proj = self._kv_projection(arch.k_shift)
        self.v_proj = self._kv_projection(arch.v_shift)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        if arch.gate == "full":
            setattr(self, self._names["gate"], nn.Linear(hidden, heads))
        # Constant gates stay float32: in half precision all tokens would have the same error in log f, up to 3 %.
        elif arch.gate == "bias_only":
            self.fgate_bias = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        elif arch.gate == "fixed":
            self.register_buffer("fgate_bias", torch.zeros(heads, dtype=torch.float32))
        if arch.output_gate is not None:
            setattr(self, self._names["output"], nn.Linear(hidden, hidden, bias=False))
        if arch.output_norm:
            self.output_norm = RMSNorm(hidden, arch.norm_eps, dim)
        if arch.qk_norm != "none":
            shared = arch.qk_norm == "shared"
            self.q_norm = RMSNorm(dim if shared else hidden, arch.qk_norm_eps, dim)
            self.k_norm = RMSNorm(dim if shared else kv_heads * dim, arch.qk_norm_eps, dim)

    @property
    def _names(self) -> dict[str, str]:
        official = self.arch.dialect == OFFICIAL
        return (
            {"gate": "fgate_proj", "output": "ogate_proj"} if official else {"gate": "f_proj", "output": "g_proj"}
        )

    def _kv_projection(self, shifted: bool) -> nn.Module:
        arch = self.arch
        if shifted:
            return ShiftedLinear(arch.hidden_size, arch.num_kv_heads, arch.head_dim)
        return nn.Linear(arch.hidden_size, arch.num_kv_heads * arch.head_dim, bias=arch.qkv_bias)

    def forward(self, x: torch.Tensor, line: Line, cache: ForgettingCache | None) -> torch.Tensor:
        """Map normed x [N, hidden] to the attention output [N, hidden]."""
        arch, dim = self.arch, self.arch.head_dim
        layer = None if cache is None else cache.layer(self.layer)
        past = layer if layer is not None and layer.is_initialized else None
        projected = self._projections()
        made = dict(zip(projected, joint(x, list(projected.values()))))
        q, k, v = (made[name].unflatten(-1, (-1, dim)) for name in "qkv")
        before_k, before_v = (None, None) if past is None else past.last
        last_k, last_v = line.newest(k, before_k), line.newest(v, before_v)
        q = recomputed(self._query, q)
        k = recomputed(self._key, k, made.get("k shift"), line, before_k)
        v = self._shifted(v, made.get("v shift"), line, before_v)
        if arch.rope_base is not None:
            q, k = (rotate(y, line.positions, arch.rope_base) for y in (q, k))
        log_forget = self._log_forget(made.get("gate"), x)
        if past is not None:
            q, k, v, log_forget = (line.unpack(y) for y in (q, k, v, log_forget))
            out = line.pack(past.attend(q, k, v, log_forget, line.real(), (last_k, last_v), dim**-0.5))
        else:
            tolerance = arch.log_pruning_tolerance
            out = forgetting_attention(
                q[None], k[None], v[None], log_forget[None],
                cu_seqlens=line.cu_seqlens, threshold=None if tolerance is None else "auto",
                log_pruning_tolerance=tolerance or 0.0,
            )[0]  # fmt: skip
            if layer is not None:
                k, v, log_forget = (line.unpack(y) for y in (k, v, log_forget))
                layer.fill(k, v, log_forget, line.real(), (last_k, last_v))
        return self.o_proj(recomputed(self._gated, out, made.get("output gate")))

    def _projections(self) -> dict[str, nn.Module]:
        """Return the layers that read ``x``."""
        found: dict[str, nn.Module] = {"q": self.q_proj}
        for name, projection in (("k", self.k_proj), ("v", self.v_proj)):
            if isinstance(projection, ShiftedLinear):
                found |= {name: projection.linear, f"{name} shift": projection.shift_proj}
            else:
                found[name] = projection
        if self.arch.gate == "full":
            found["gate"] = getattr(self, self._names["gate"])
        if self.arch.output_gate is not None:
            found["output gate"] = getattr(self, self._names["output"])
        return found

    def _query(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the norm of queries, if there is one, to y [N, H, d]."""
        return y if self.arch.qk_norm == "none" else self.q_norm.wide(y.flatten(-2)).to(y.dtype)

    def _key(
        self, y: torch.Tensor, shift: torch.Tensor | None, line: Line, last: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the token shift and the norm of keys, those that there are, to y [N, KV heads, d]."""
        y = self._shifted(y, shift, line, last)
        return y if self.arch.qk_norm == "none" else self.k_norm.wide(y.flatten(-2)).to(y.dtype)

    def _shifted(
        self, y: torch.Tensor, shift: torch.Tensor | None, line: Line, last: torch.Tensor | None
    ) -> torch.Tensor:
        """Apply the token shift to a projection y [N, KV heads, d].

        Args:
            shift: [N, KV heads] logits of the weight of the token before; None if there is no shift.
            last: [B, KV heads, d] projection of the tokens before, not shifted; None at the beginning of sequences.
        """
        if shift is None:
            return y
        first = (line.offsets == 0)[:, None, None]
        before = F.pad(y[:-1], (0, 0, 0, 0, 1, 0))
        before = torch.where(first, 0.0 if last is None else last.to(y.dtype)[line.sequence], before)
        # Where a is close to 1, half precision would leave few digits of 1 - a.
        a = shift.to(torch.promote_types(y.dtype, torch.float32)).sigmoid()[..., None]
        return (a * before + (1 - a) * y).to(y.dtype)

    def log_forget(self, x: torch.Tensor) -> torch.Tensor:
        """Map normed x [N, hidden] to log f [N, H] in float32 or wider."""
        full = self.arch.gate == "full"
        return self._log_forget(getattr(self, self._names["gate"])(x) if full else None, x)

    def _log_forget(self, gate: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
        """Return log f [N, H] in float32 or wider, given the logits [N, H] of gates that depend on x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.arch.gate == "none":
            return torch.zeros(len(x), self.arch.num_heads, dtype=wide, device=x.device)
        if gate is not None:
            return F.logsigmoid(gate.to(wide))
        return F.logsigmoid(self.fgate_bias.to(wide)).expand(len(x), -1)

    def _gated(self, out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Apply the output norm and the gate [N, hidden] to ``out`` [N, H, d] in float32, and round once to
        [N, hidden]."""
        out = out.flatten(-2)
        if not self.arch.output_norm and gate is None:
            return out
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.arch.output_norm:
            wide = self.output_norm.wide(out).flatten(-2)
        if gate is not None:
            gate = gate.to(wide.dtype)
            wide = wide * (gate.sigmoid() if self.arch.output_gate == "sigmoid" else F.silu(gate))
        return wide.to(out.dtype)

    def threshold(self, input_norm: torch.Tensor, tolerance: float | None = None) -> torch.Tensor:
        """Return ACP's threshold [H] for all later queries, from the weights alone; -inf if nothing is pruned.

        Args:
            input_norm: [hidden] weight of the norm that made ``x``.
            tolerance: stands in for a ``log_pruning_tolerance`` that the config does not have.
        """
        arch, device = self.arch, self.o_proj.weight.device
        # Under autocast, projections round their weights and their results to the dtype of autocast.
        dtype = self.o_proj.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if arch.log_pruning_tolerance is not None:
            tolerance = arch.log_pruning_tolerance
        if tolerance is None:
            return torch.full((arch.num_heads,), -torch.inf, device=device)
        bound = with_rounding(self.logit_bound(input_norm, dtype), dtype, dtype)
        return pruning_threshold(bound, self.max_length, tolerance).to(device)

    def logit_bound(self, input_norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return U >= |q . k| / sqrt(d) of every query head, from the weights alone: [H] float32 on the CPU.

        Args:
            input_norm: [hidden] weight of the norm that made ``x``.
            dtype: in which the projections compute.
        """
        arch, dim = self.arch, self.arch.head_dim
        if arch.qk_norm != "none":
            w_q, w_k = self.q_norm.weight.view(-1, dim), self.k_norm.weight.view(-1, dim)
            return qk_norm_bound(w_q.expand(arch.num_heads, -1), w_k.expand(arch.num_kv_heads, -1))
        k_proj = self.k_proj.linear if isinstance(self.k_proj, ShiftedLinear) else self.k_proj
        assert isinstance(k_proj, nn.Linear)
        both = (self.q_proj, k_proj)
        w_q, w_k = (p.weight.to(dtype).unflatten(0, (-1, dim)) for p in both)
        b_q, b_k = (p.bias.to(dtype).unflatten(0, (-1, dim)) if arch.qkv_bias else None for p in both)
        return projection_bound(w_q, w_k, input_norm, b_q, b_k, rotated=arch.rope_base is not None)


class GatedMLP(nn.Module):
    """The gated MLP ``down(act(gate(x)) * up(x))``. In the official dialect gate and up are one tensor."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        joint = arch.dialect == OFFICIAL
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size * (2 if joint else 1), bias=False)
        if not joint:
            self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=False)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=False)
        self.joint, self.activation = joint, arch.mlp_act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [N, hidden] to the output [N, hidden]."""
        both = self.gate_proj(x) if self.joint else side_by_side(x, (self.gate_proj, self.up_proj))
        if both is not None and can_project(both, self.down_proj):
            return projected(both, self.down_proj, self.activation)
        gate, up = joint(x, (self.gate_proj, self.up_proj)) if both is None else both.chunk(2, -1)
        return self.down_proj(recomputed(gated, gate, up, self.activation))


class ForgettingTransformerBlock(GradientCheckpointingLayer):
    """One layer: normed attention and normed MLP, each added to the residual stream."""

    def __init__(self, arch: Architecture, max_length: int, layer: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.attn = ForgettingSelfAttention(arch, max_length, layer)
        self.mlp_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.mlp = GatedMLP(arch)

    def forward(self, x: torch.Tensor, line: Line, cache: ForgettingCache | None = None) -> torch.Tensor:
        """Map x [N, hidden] to the output [N, hidden]."""
        if cache is None and fuses(self, x):  # caches are of generation, where every step is another length
            return fused(type(self)._compute)(self, x, line, None)
        return self._compute(x, line, cache)

    def _compute(self, x: torch.Tensor, line: Line, cache: ForgettingCache | None) -> torch.Tensor:
        x, normed = add_norm(self.attn_norm, x)
        x, normed = add_norm(self.mlp_norm, x, self.attn(normed, line, cache))
        return x + self.mlp(normed)


class ForgettingPreTrainedModel(PreTrainedModel):
    """The base class of the FoX models for transformers."""

    config_class: type[PretrainedConfig] = FoxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ForgettingTransformerBlock"]  # noqa: RUF012 (as transformers declares them)
    _is_stateful = True  # generation cannot go back to an earlier token, which assistants need
    _keys_to_ignore_on_load_unexpected = [r"rotary\.inv_freq$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ForgettingSelfAttention) and module.arch.gate in ("bias_only", "fixed"):
            bias = torch.zeros(module.arch.num_heads)
            if self.config.fgate_bias_init:
                # The times in which heads decay by 1 / e are spread evenly on a logarithmic scale.
                times = torch.logspace(
                    math.log10(self.config.decay_time_min), math.log10(self.config.decay_time_max), len(bias)
                )
                bias = -torch.log(torch.expm1(1 / times))
            module.fgate_bias.copy_(bias)


class ForgettingTransformerModel(LineModelMixin, ForgettingPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: FoxConfig | FlaForgettingTransformerConfig) -> None:
        config.check()
        super().__init__(config)
        arch = Architecture.from_config(config)
        self.embeddings = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(
            ForgettingTransformerBlock(arch, config.max_position_embeddings, n) for n in range(arch.num_layers)
        )
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embeddings = value

    def new_cache(self) -> ForgettingCache:
        """Make an empty cache with this model's thresholds."""
        blocks = [block for block in self.layers if isinstance(block, ForgettingTransformerBlock)]
        return ForgettingCache([block.attn.threshold(block.attn_norm.weight) for block in blocks])

    def past_of(self, cache: object, batch: int) -> dict[str, Any]:
        """Return what :meth:`.Line.of` needs to know of earlier calls, given the cache that they filled, if any."""
        if cache is None:
            return {}
        if not isinstance(cache, ForgettingCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: it must be a ForgettingCache (model.new_cache(), or "
                "leave it out), because gates are cached as well."
            )
        if len(cache.layers) != len(self.layers):
            raise ValueError(f"past_key_values has {len(cache.layers)} layers: the model has {len(self.layers)}.")
        if self.is_gradient_checkpointing and self.training:
            raise ValueError("past_key_values is given: gradient checkpointing would add all tokens to it twice.")
        if cache.positions is not None and len(cache.positions) != batch:
            raise ValueError(f"past_key_values holds {len(cache.positions)} rows: the input has {batch}.")
        return {"past": cache.positions, "past_length": cache.get_seq_length()}

    def cache_for(self, line: Line, use_cache: bool | None) -> ForgettingCache | None:
        """Make a cache if there is to be one."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not line.packed
        elif use_cache and line.packed:
            raise ValueError("use_cache is true: packed sequences cannot be continued, so leave it out.")
        if use_cache and self.is_gradient_checkpointing and self.training:
            logger.warning_once("use_cache is true: there is no cache with gradient checkpointing.")
            use_cache = False
        return self.new_cache() if use_cache else None


class FlaForgettingTransformerModel(ForgettingTransformerModel):
    """The same of flash-linear-attention's dialect."""

    config_class = FlaForgettingTransformerConfig


class ForgettingTransformerForCausalLM(LineForCausalLM, ForgettingPreTrainedModel, PackingGenerationMixin):
    """A FoX language model of the official dialect: loads, trains, generates and saves its checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: FoxConfig | FlaForgettingTransformerConfig) -> None:
        super().__init__(config)
        self.model = ForgettingTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self) -> ForgettingCache:
        """Make an empty cache with this model's thresholds."""
        return self.model.new_cache()


class FlaForgettingTransformerForCausalLM(ForgettingTransformerForCausalLM):
    """A FoX language model of flash-linear-attention's dialect."""

    config_class = FlaForgettingTransformerConfig


# save_pretrained writes these names into config.json, and both dialects name their architectures alike.
FlaForgettingTransformerModel.__name__ = ForgettingTransformerModel.__name__
FlaForgettingTransformerForCausalLM.__name__ = ForgettingTransformerForCausalLM.__name__
