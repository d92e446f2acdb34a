"""Llama, Mistral, Qwen2 and Qwen3 that evict tokens (DMS, arXiv 2506.05345; KVzap, arXiv 2601.07891), as a
transformers model.

MLP, norms and RoPE are transformers' own Llama, whose parts these models share. Modules are named like the tensors
of a checkpoint. A token's decision is hard when the model is evaluated. In training it is soft and noisy, so that
what decides has gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from vllm_fox.families.evicting.config import EvictingDecoderConfig, Eviction
from vllm_fox.hf.autocast import for_projections
from vllm_fox.hf.generation import PackingGenerationMixin, RecomputingMixin
from vllm_fox.hf.line import Line
from vllm_fox.hf.line_model import LineForCausalLM, LineModelMixin
from vllm_fox.hf.watching import evaluating
from vllm_fox.kernels.subset.training import fading_attention

from .decisions import about, add_decisions, decision_logits, log_kept, noisy

TEMPERATURE = 0.1
"""Of the soft decision in training, as in DMS."""
DECIDED = 6.0
"""Size of a logit from which a decision is sure: noise turns one in 400 of them. Beyond it there is next to no
gradient."""


@dataclass
class EvictingModelOutput(BaseModelOutput):
    """Hidden states, and how much is evicted.

    Attributes:
        evicted: [layers] share of the decisions about tokens that evict. In training mode a soft decision has the
            gradient (straight through).
        excess: [layers] mean square of what the decisions' logits have beyond :data:`DECIDED`, on either side. It
            is 0 where the model is evaluated.
    """

    evicted: torch.Tensor | None = None
    excess: torch.Tensor | None = None


class EvictingSelfAttention(nn.Module):
    """Projections, norms, RoPE and decisions around attention over what is not evicted.

    Attributes:
        evicts: whether tokens are evicted. If not, the layer attends to all of them: the dense model from which
            one that evicts can learn. A borrowed neuron is no part of the query even then.
    """

    def __init__(self, config: EvictingDecoderConfig) -> None:
        super().__init__()
        size, dim = config.hidden_size, config.head_dim
        self.head_dim, self.eviction = dim, Eviction.from_dict(config.eviction)
        self.evicts = not self.eviction.disabled
        self.q_proj = nn.Linear(size, config.num_attention_heads * dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * dim, size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = LlamaRMSNorm(dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(dim, eps=config.rms_norm_eps)
        self.normed = config.qk_norm
        add_decisions(self, config, self.eviction)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor, line: Line, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map normed x [N, hidden], the norm of ``residual``, to the attention's output [N, hidden].

        Args:
            rope: cosines and sines, [1, N, d].

        Returns:
            The output, and two numbers: the share of what is decided that evicts, and the logits' excess.
        """
        q, k, v = self.project(x)
        kept, said = self._decide(x, residual, q, line)
        borrowed = self.eviction.method == "dms_borrowed_neuron"
        if borrowed:
            q = self._without_neuron(q)
        q, k = self.rotate(q, k, rope)
        if borrowed:
            # RoPE has turned another number of the query into its place.
            q = self._without_neuron(q)
        window = self.eviction.window
        out = fading_attention(q.flatten(1, 2), k, v.to(q.dtype), kept, window=window, cu_seqlens=line.cu_seqlens)
        return self.o_proj(out.flatten(1).to(x.dtype)), said

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Map normed x [N, hidden] to queries [N, KV heads, G, d], keys and values [N, KV heads, d].

        Queries and keys are normed, if the model does that, and not yet turned by RoPE.
        """
        q, k, v = (y(x).unflatten(-1, (-1, self.head_dim)) for y in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        return q.unflatten(1, (k.shape[1], -1)), k, v

    @staticmethod
    def rotate(
        q: torch.Tensor, k: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn queries [N, KV heads, G, d] and keys [N, KV heads, d] by RoPE's cosines and sines [1, N, d]."""
        heads = (y.transpose(0, 1)[None] for y in (q.flatten(1, 2), k))
        turned, k = (y[0].transpose(0, 1) for y in apply_rotary_pos_emb(*heads, *rope))
        return turned.unflatten(1, (k.shape[1], -1)), k

    def decisions(self, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor, line: Line) -> torch.Tensor:
        """Return what is decided about N tokens: [N, KV heads], more than 0 where a token goes. Nothing is decided
        about the last token of a sequence if the next one would decide."""
        logits = decision_logits(self, self.eviction, x, residual, q)
        last = line.offsets + 1 == line.cu_seqlens.diff()[line.sequence]
        return about(logits, self.eviction.shift, last, float("-inf"))

    def _decide(
        self, x: torch.Tensor, residual: torch.Tensor, q: torch.Tensor, line: Line
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log_kept [N, KV heads] for attention, and [2]: the evicted share and the logits' excess."""
        logits = self.decisions(x, residual, q, line)
        nothing = torch.zeros((), dtype=logits.dtype, device=logits.device)
        if not self.evicts:
            return torch.zeros_like(logits), torch.stack([nothing, nothing])
        if not self.training:
            gone = logits > 0
            share = gone.to(logits.dtype).mean()
            return torch.zeros_like(logits).masked_fill(gone, float("-inf")), torch.stack([share, nothing])
        beyond = (logits.abs() - DECIDED).clamp(min=0).masked_fill(logits.isinf(), 0)
        logits = noisy(logits)
        soft = (logits / TEMPERATURE).sigmoid()
        hard = (logits > 0).to(soft.dtype)
        share = (soft + (hard - soft).detach()).mean()
        return log_kept(logits, TEMPERATURE), torch.stack([share, beyond.square().mean()])

    @staticmethod
    def _without_neuron(q: torch.Tensor) -> torch.Tensor:
        """Queries [N, KV heads, G, d] with 0 for the last number of each group's first one."""
        mask = torch.ones_like(q[0])
        mask[:, 0, -1] = 0
        return q * mask


class EvictingDecoderLayer(GradientCheckpointingLayer):
    """One layer: normed attention and normed MLP, each added to the residual stream."""

    def __init__(self, config: EvictingDecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = EvictingSelfAttention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self, x: torch.Tensor, line: Line, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map x [N, hidden] to the output [N, hidden], and say what the attention says."""
        y, said = self.self_attn(for_projections(self.input_layernorm(x)), x, line, rope)
        x = x + y
        return x + self.mlp(for_projections(self.post_attention_layernorm(x))), said


class EvictingPreTrainedModel(PreTrainedModel):
    """The base class of the models that evict, for transformers."""

    config_class = EvictingDecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EvictingDecoderLayer"]  # noqa: RUF012 (as transformers declares them)
    _is_stateful = True  # generation cannot go back to an earlier token, which assistants need

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class EvictingDecoderModel(LineModelMixin, EvictingPreTrainedModel):
    """Embeddings, layers and final norm."""

    def __init__(self, config: EvictingDecoderConfig) -> None:
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(EvictingDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        llama: Any = config  # whose fields it has
        self.rotary_emb = LlamaRotaryEmbedding(llama)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embed_tokens = value

    def context(self, x: torch.Tensor, line: Line, cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return RoPE's cosines and sines, [1, N, d]."""
        cos, sin = self.rotary_emb(x[None], line.positions[None])
        return cos, sin

    def run_layer(self, layer: nn.Module, x: torch.Tensor, line: Line, context: Any) -> tuple[torch.Tensor, Any]:
        x, said = layer(x, line, context)
        return x, said

    def output(self, hidden: Any, cache: Any, states: tuple[Any, ...] | None, said: list[Any]) -> Any:
        evicted, excess = torch.stack(said).unbind(1)
        return EvictingModelOutput(last_hidden_state=hidden, hidden_states=states, evicted=evicted, excess=excess)


class EvictingDecoderForCausalLM(
    LineForCausalLM, EvictingPreTrainedModel, RecomputingMixin, PackingGenerationMixin
):
    """A decoder that evicts tokens. It loads, trains, generates and saves the checkpoints that a server serves."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: EvictingDecoderConfig) -> None:
        super().__init__(config)
        self.model = EvictingDecoderModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def set_evicts(self, evicts: bool) -> None:
        """Switch eviction on, or off to have the dense model."""
        for module in self.modules():
            if isinstance(module, EvictingSelfAttention):
                module.evicts = evicts

    def move_threshold(self, by: float) -> None:
        """Evict only where the decision is more than ``by``.

        DMS's offset or KVzap's threshold changes by as much, in the config and in all layers.
        """
        eviction = dict(self.config.eviction)
        if eviction["method"] == "kvzap":
            eviction["threshold"] -= by
        else:
            eviction["offset"] += by
        self.config.eviction = eviction
        for module in self.modules():
            if isinstance(module, EvictingSelfAttention):
                module.eviction = Eviction.from_dict(self.config.eviction)

    def evicted(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return which tokens of texts [B, T] go when they leave their window: [layers, B, KV heads, T] bool."""
        return self.decisions(input_ids) > 0

    @torch.no_grad()
    def decisions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return what is decided about tokens of texts [B, T]: [layers, B, KV heads, T], more than 0 if they go."""
        found: list[torch.Tensor] = []
        layers = [module for module in self.modules() if isinstance(module, EvictingSelfAttention)]

        def record(layer: nn.Module, given: tuple[Any, ...], _: Any) -> None:
            x, residual, line = given[:3]
            assert isinstance(layer, EvictingSelfAttention)
            decided = layer.decisions(x, residual, layer.project(x)[0], line)
            decided = decided if layer.evicts else torch.full_like(decided, float("-inf"))
            found.append(decided.view(*input_ids.shape, -1).transpose(1, 2))

        with evaluating(self, [layer.register_forward_hook(record) for layer in layers]):
            self.model(input_ids)
        return torch.stack(found)
