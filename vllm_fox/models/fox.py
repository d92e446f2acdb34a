"""The Forgetting Transformer (FoX, arXiv 2503.02130) for vLLM: both dialects, every option."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from vllm_fox.architecture import QK_NORM_EPS, Architecture
from vllm_fox.attention.layer import ForgettingAttention
from vllm_fox.kernels.cache_write import rotate

from .bounds import norm_bound, projection_bound
from .weights import load_weights


def head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of each head, in float32.

    Args:
        x: [T, H, d].
        weight: [H, d].
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class HeadWeight(nn.Module):
    """A weight [H, d] of the heads on this rank; the checkpoint has all heads, or one for all."""

    def __init__(self, total_heads: int, local_heads: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(local_heads, dim), requires_grad=False)
        self.weight.weight_loader = self._load
        self._total_heads = total_heads

    def _load(self, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        local, dim = parameter.shape
        if tensor.numel() == dim:
            parameter.data.copy_(tensor.expand(local, dim))
            return
        # Heads fewer than ranks are replicated, as vLLM's QKV projection does.
        first = get_tensor_model_parallel_rank() * self._total_heads // get_tensor_model_parallel_world_size()
        parameter.data.copy_(tensor.view(-1, dim)[first : first + local])


class FoxAttention(nn.Module):
    """Projections, gates, norms and output of forgetting attention; the heart is ForgettingAttention."""

    def __init__(self, arch: Architecture, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.arch = arch
        ranks = get_tensor_model_parallel_world_size()
        dim, hidden = arch.head_dim, arch.hidden_size
        if arch.num_heads % ranks:
            raise ValueError(
                f"--tensor-parallel-size {ranks} does not divide the model's {arch.num_heads} heads: choose a divisor."
            )
        self.num_heads = arch.num_heads // ranks
        self.num_kv_heads = max(1, arch.num_kv_heads // ranks)
        self.head_dim = dim

        def by_head(name: str, size: int, bias: bool = False) -> ColumnParallelLinear:
            return ColumnParallelLinear(hidden, size, bias=bias, prefix=f"{prefix}.{name}")

        self.qkv_proj = QKVParallelLinear(
            hidden, dim, arch.num_heads, arch.num_kv_heads, bias=arch.qkv_bias, prefix=f"{prefix}.qkv_proj"
        )
        self.o_proj = RowParallelLinear(hidden, hidden, bias=False, prefix=f"{prefix}.o_proj")
        self.gate_proj = by_head("gate_proj", arch.num_heads, bias=True) if arch.gate == "full" else None
        if arch.gate in ("bias_only", "fixed"):
            self.fgate_bias = nn.Parameter(torch.empty(self.num_heads), requires_grad=False)
            self.fgate_bias.weight_loader = self._load_gate_bias
        self.k_shift_proj = by_head("k_shift_proj", arch.num_heads) if arch.k_shift else None
        self.v_shift_proj = by_head("v_shift_proj", arch.num_heads) if arch.v_shift else None
        self.output_gate_proj = by_head("output_gate_proj", hidden) if arch.output_gate else None
        self.output_norm = HeadWeight(arch.num_heads, self.num_heads, dim) if arch.output_norm else None
        normed = arch.qk_norm != "none"
        self.q_norm = HeadWeight(arch.num_heads, self.num_heads, dim) if normed else None
        self.k_norm = HeadWeight(arch.num_kv_heads, self.num_kv_heads, dim) if normed else None
        self.attn = ForgettingAttention(
            vllm_config=vllm_config,
            prefix=f"{prefix}.attn",
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=dim,
            k_norm=self.k_norm.weight if self.k_norm is not None else None,
            qk_norm_eps=QK_NORM_EPS,
            rope_base=arch.rope_base,
            k_shift=arch.k_shift,
            v_shift=arch.v_shift,
            log_pruning_tolerance=arch.log_pruning_tolerance,
        )

    def _load_gate_bias(self, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
        first = get_tensor_model_parallel_rank() * self.num_heads
        parameter.data.copy_(tensor[first : first + self.num_heads])

    def set_logit_bound(self, input_norm: torch.Tensor) -> None:
        """Derive the pruning bound from the loaded weights (docs/acp.md).

        Args:
            input_norm: [n] weight of the norm before the projections.
        """
        if self.q_norm is not None and self.k_norm is not None:
            bound = norm_bound(self.q_norm.weight, self.k_norm.weight)
        else:
            heads, dim = (self.num_heads, self.num_kv_heads), self.head_dim
            sizes = [heads[0] * dim, heads[1] * dim, heads[1] * dim]
            q, k, _ = self.qkv_proj.weight.split(sizes)
            biases: list[torch.Tensor | None] = [None, None]
            if self.arch.qkv_bias:
                q_bias, k_bias, _ = self.qkv_proj.bias.split(sizes)
                biases = [q_bias.view(heads[0], dim), k_bias.view(heads[1], dim)]
            bound = projection_bound(
                q.view(heads[0], dim, -1),
                k.view(heads[1], dim, -1),
                input_norm,
                *biases,
                rotated=self.arch.rope_base is not None,
            )
        self.attn.set_logit_bound(bound)

    def _log_forget(self, x: torch.Tensor) -> torch.Tensor:
        """log f, [T, h] float32."""
        if self.arch.gate == "none":
            return torch.zeros(x.shape[0], self.num_heads, dtype=torch.float32, device=x.device)
        if self.gate_proj is not None:
            return F.logsigmoid(self.gate_proj(x)[0].float())
        return F.logsigmoid(self.fgate_bias.float()).expand(x.shape[0], -1).contiguous()

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            positions: [T].
            x: [T, n], normed.
        """
        arch, dim = self.arch, self.head_dim
        kv_size = self.num_kv_heads * dim
        q, k, v = self.qkv_proj(x)[0].split([self.num_heads * dim, kv_size, kv_size], dim=-1)
        heads = q.view(-1, self.num_heads, dim)
        if self.q_norm is not None:
            heads = head_norm(heads, self.q_norm.weight, QK_NORM_EPS)
        if arch.rope_base is not None:
            heads = rotate(heads, positions, arch.rope_base)
        shift_k = self.k_shift_proj(x)[0].float().sigmoid() if self.k_shift_proj is not None else None
        shift_v = self.v_shift_proj(x)[0].float().sigmoid() if self.v_shift_proj is not None else None
        out = self.attn(
            heads.reshape(-1, self.num_heads * dim),
            k.contiguous(),
            v.contiguous(),
            self._log_forget(x),
            shift_k,
            shift_v,
        )
        if self.output_norm is not None:
            normed = head_norm(out.view(-1, self.num_heads, dim), self.output_norm.weight, arch.norm_eps)
            out = normed.view(-1, self.num_heads * dim)
        if self.output_gate_proj is not None:
            gate = self.output_gate_proj(x)[0]
            out = out * (gate.sigmoid() if arch.output_gate == "sigmoid" else F.silu(gate))
        return self.o_proj(out)[0]


class FoxMLP(nn.Module):
    """Gated MLP."""

    def __init__(self, arch: Architecture, prefix: str) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            arch.hidden_size, [arch.intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            arch.intermediate_size, arch.hidden_size, bias=False, prefix=f"{prefix}.down_proj"
        )
        self.silu = SiluAndMul() if arch.activation == "silu" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj(x)[0]
        if self.silu is not None:
            return self.down_proj(self.silu(gate_up))[0]
        gate, up = gate_up.chunk(2, dim=-1)
        return self.down_proj(gate.sigmoid() * up)[0]


class FoxBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, arch: Architecture, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        self.attn = FoxAttention(arch, vllm_config, f"{prefix}.attn")
        self.mlp_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        self.mlp = FoxMLP(arch, f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, x = x, self.attn_norm(x)
        else:
            x, residual = self.attn_norm(x, residual)
        x = self.attn(positions, x)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class FoxModel(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        arch = Architecture.from_config(vllm_config.model_config.hf_config)
        self.embeddings = VocabParallelEmbedding(
            arch.vocab_size, arch.hidden_size, prefix=f"{prefix}.embeddings"
        )
        self.layers = nn.ModuleList(
            FoxBlock(arch, vllm_config, f"{prefix}.layers.{layer}") for layer in range(arch.num_layers)
        )
        self.norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual: torch.Tensor | None = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]


class ForgettingTransformerForCausalLM(nn.Module):
    """What vLLM loads for ``architectures: ["ForgettingTransformerForCausalLM"]``."""

    # Every tensor must be known, so do not take other safetensors files of the folder for weights.
    allow_patterns_overrides = ["model*.safetensors", "*.safetensors"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.architecture = Architecture.from_config(vllm_config.model_config.hf_config)
        arch = self.architecture
        self.model = FoxModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            arch.vocab_size, arch.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if arch.tied_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embeddings)
        self.logits_processor = LogitsProcessor(arch.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint of either dialect, strictly, and fix the pruning bounds."""
        loaded = load_weights(self, self.architecture, weights)
        for layer in self.model.layers:
            layer.attn.set_logit_bound(layer.attn_norm.weight)
        if self.architecture.tied_embeddings:
            loaded.add("lm_head.weight")
        return loaded
