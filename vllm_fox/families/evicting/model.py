"""Llama, Mistral, Qwen2 and Qwen3 that evict tokens, as a vLLM model.

All of it but the attention is vLLM's own Llama, whose layers these models share.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from vllm_fox.checkpoint_files import CHECKPOINT_FILES
from vllm_fox.modules.heads import HeadShare
from vllm_fox.modules.weights import check_update

from .config import EvictingDecoderConfig, Eviction
from .decisions import make_decisions
from .layer import EvictingAttention

DECISION_TENSORS = (".self_attn.dms_proj_alpha", ".self_attn.kvzap.")
"""How the names of the tensors that decide begin, after the layer's."""
DECISIONS = ".self_attn.decisions."
"""Where they are in this model."""


class EvictingSelfAttention(nn.Module):
    """Projections, norms, RoPE and decisions around attention over what is not evicted.

    The arguments are those with which vLLM's decoder layer makes its attention.
    """

    neurons: torch.Tensor

    def __init__(
        self,
        vllm_config: VllmConfig,
        *,
        config: EvictingDecoderConfig,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int,
        quant_config: QuantizationConfig | None,
        bias: bool,
        bias_o_proj: bool,
        prefix: str,
        **unused: Any,
    ) -> None:
        super().__init__()
        dim = self.head_dim = config.head_dim
        kv_heads = HeadShare.of_rank(num_kv_heads)
        self.qkv_proj = QKVParallelLinear(
            hidden_size, dim, num_heads, num_kv_heads, bias, quant_config=quant_config, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(
            num_heads * dim, hidden_size, bias_o_proj, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, kv_heads.count
        self.rotary_emb = get_rope(dim, max_position_embeddings, rope_parameters=config.rope_parameters)
        self.q_norm = RMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.decisions = make_decisions(config, kv_heads)
        if self.decisions.borrows_neuron:
            neurons = torch.zeros(self.num_heads, dim, dtype=torch.bool)
            neurons[:: self.num_heads // self.num_kv_heads, -1] = True
            self.register_buffer("neurons", neurons.flatten(), persistent=False)
        eviction = Eviction.from_dict(config.eviction)
        self.disabled = eviction.disabled
        self.attn = EvictingAttention(
            vllm_config=vllm_config,
            prefix=f"{prefix}.attn",
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=dim,
            window=eviction.window,
            shift=eviction.shift,
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Map normed x [T, hidden], the norm of ``residual``, to the attention output [T, hidden]."""
        qkv, _ = self.qkv_proj(x)
        sizes = [self.num_heads * self.head_dim, *[self.num_kv_heads * self.head_dim] * 2]
        q, k, v = qkv.split(sizes, dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        by_group = q.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        evicts = self.decisions(x, residual, by_group).expand(-1, self.num_kv_heads)
        evicts = (torch.zeros_like(evicts) if self.disabled else evicts).contiguous()
        if self.decisions.borrows_neuron:
            # The compiler makes this a part of the kernels before and behind RoPE, which a write in place is not.
            q = torch.where(self.neurons, 0, q)
        q, k = self.rotary_emb(positions, q, k)
        if self.decisions.borrows_neuron:
            # RoPE has turned another number of the query into its place.
            q = torch.where(self.neurons, 0, q)
        out, _ = self.o_proj(self.attn(q, k, v, evicts))
        return out


class EvictingDecoderLayer(LlamaDecoderLayer):
    """vLLM's decoder layer with another attention, which also reads the residual stream."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        attention: Any = partial(EvictingSelfAttention, vllm_config)
        super().__init__(vllm_config, prefix, attn_layer_type=attention)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map the output [T, hidden] of the layer below and the residual stream to this layer's."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, residual)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class EvictingDecoderForCausalLM(LlamaForCausalLM):
    """A decoder that evicts tokens, as vLLM loads and runs it."""

    # Load only safetensors, which hold no code, and ignore other .safetensors files beside the model.
    fall_back_to_pt_during_load: ClassVar[bool] = False
    allow_patterns_overrides: ClassVar[list[str]] = CHECKPOINT_FILES
    # vLLM's layer for adapters of lm_head takes one row a request, which log-probabilities of prompts have not.
    embedding_modules: ClassVar[dict[str, str]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=EvictingDecoderLayer)
        # Dummy weights are there from the start, for a trainer to replace them part by part.
        self.has_weights = vllm_config.load_config.load_format == "dummy"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or a part of one later.

        Raises:
            ValueError: a checkpoint lacks tensors that decide. vLLM looks for missing tensors only where no weights
                are quantised. Or quantised weights cannot be replaced.
        """
        if self.has_weights:
            check_update(self)
        loaded = super().load_weights((_name_here(name), tensor) for name, tensor in weights)
        if not self.has_weights:
            missing = sorted({name for name, _ in self.named_parameters() if DECISIONS in name} - loaded)
            if missing:
                more = f", and {len(missing) - 1} more such" if len(missing) > 1 else ""
                raise ValueError(
                    f"The checkpoint lacks {missing[0].replace(DECISIONS, '.self_attn.')}, which decides what is "
                    f"evicted{more}: convert it again."
                )
            self.has_weights = True
        return loaded


def _name_here(name: str) -> str:
    """The name of a checkpoint's tensor in this model."""
    if any(part in name for part in DECISION_TENSORS):
        return name.replace(".self_attn.", DECISIONS)
    return name
