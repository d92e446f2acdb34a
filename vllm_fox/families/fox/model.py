"""The Forgetting Transformer (FoX, arXiv 2503.02130) as a vLLM model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_fox.checkpoint_files import CHECKPOINT_FILES
from vllm_fox.kernels.rope import rotate
from vllm_fox.modules.heads import HeadNorm, HeadProjection, HeadShare
from vllm_fox.modules.linear import HeadLinear, input_rounding, is_quantised, used_weight
from vllm_fox.modules.weights import CheckpointLoader, Stored, as_quantised

from .architecture import Architecture, expected_weights
from .bounds import projection_bound, qk_norm_bound
from .head_order import deal, memory_score
from .layer import ForgettingAttention
from .weights import adapter_names, layer_of, load_checkpoint, parts_of


def separates_gates(vllm_config: VllmConfig) -> bool:
    """Return whether the gates are a product of their own, because the projections are a layer of vLLM's."""
    return vllm_config.quant_config is not None or vllm_config.lora_config is not None


class GatedMLP(nn.Module):
    """The gated MLP ``down(act(gate(x)) * up(x))``.

    Args:
        vllm_config: the engine's configuration.
        arch: description of the model.
        prefix: the module's name.
    """

    def __init__(self, vllm_config: VllmConfig, arch: Architecture, prefix: str) -> None:
        super().__init__()
        hidden, inner, quant = arch.hidden_size, arch.intermediate_size, vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, bias=False, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.down_proj"
        )
        self.act = SiluAndMul() if arch.mlp_act == "silu" else SigmoidAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, hidden] to the output [T, hidden]."""
        both, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act(both))
        return out


class SigmoidAndMul(nn.Module):
    """The activation ``sigmoid(a) * b`` of an input ``[a, b]``, computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, 2 * n] to [T, n]."""
        gate, up = x.float().chunk(2, dim=-1)
        return (gate.sigmoid() * up).to(x.dtype)


class ForgettingSelfAttention(nn.Module):
    """Projections, gates and norms around forgetting attention.

    The attention layer gets keys and values as projected. Their token shift needs the previous token, which the
    cache holds, so the attention layer does the shift, and after it k's norm and rotation.

    All that is computed from the input is one product, ``in_proj``. Where weights are quantised or adapters are in
    use, it is a layer of vLLM's, and the gates, which stay as they are, are a product of their own, ``gate_proj``.

    Args:
        vllm_config: the engine's configuration.
        arch: description of the model.
        prefix: the module's name.
        input_norm: returns the [hidden] weight of the norm that makes the input.
    """

    def __init__(
        self, vllm_config: VllmConfig, arch: Architecture, prefix: str, input_norm: Callable[[], torch.Tensor]
    ) -> None:
        super().__init__()
        hidden, dim = arch.hidden_size, arch.head_dim
        self._input_norm = input_norm
        heads, kv_heads = HeadShare.of_rank(arch.num_heads), HeadShare.of_rank(arch.num_kv_heads)
        self.arch, self.heads, self.kv_heads = arch, heads, kv_heads
        self.layer = extract_layer_index(prefix)
        # Query heads of all ranks, rank by rank.
        self.head_order = list(range(arch.num_heads))
        projections = {
            "q": (heads, dim, arch.qkv_bias),
            "k": (kv_heads, dim, arch.qkv_bias),
            "v": (kv_heads, dim, arch.qkv_bias),
        }
        if arch.output_gate is not None:
            projections["output_gate"] = (heads, dim, False)
        gates: dict[str, tuple[HeadShare, int, bool]] = {}
        if arch.gate == "full":
            gates["forget_gate"] = (heads, 1, True)
        gates |= {name: (kv_heads, 1, False) for name in ("k_shift", "v_shift") if getattr(arch, name)}
        quant = vllm_config.quant_config
        self.in_proj: HeadProjection | HeadLinear
        self.gate_proj: HeadProjection | None = None
        if separates_gates(vllm_config):
            self.in_proj = HeadLinear(hidden, projections, quant, prefix=f"{prefix}.in_proj")
            self.gate_proj = HeadProjection(hidden, gates) if gates else None
        else:
            # Without QK-norm the bound of the logits follows from it.
            self.in_proj = HeadProjection(hidden, projections | gates, weight_is_read=arch.qk_norm == "none")
        # Adapters put a layer of theirs in place of in_proj.
        self._sizes = dict(self.in_proj.sizes) if isinstance(self.in_proj, HeadLinear) else None
        self.o_proj = RowParallelLinear(hidden, hidden, bias=False, quant_config=quant, prefix=f"{prefix}.o_proj")
        self.output_norm = HeadNorm(heads, dim, arch.norm_eps) if arch.output_norm else None
        # In bfloat16 log f of every token would have the same error of up to 3 %, and so would all decay.
        constant = arch.gate in ("bias_only", "fixed")
        self.forget_bias = heads.parameter(dtype=torch.float32) if constant else None
        normed = arch.qk_norm != "none"
        self.q_norm = HeadNorm(heads, dim, arch.qk_norm_eps) if normed else None
        self.k_norm = HeadNorm(kv_heads, dim, arch.qk_norm_eps) if normed else None

        if not normed:
            self._rounding(input_norm())  # what cannot be bounded is refused before anything is loaded

        self.attn = ForgettingAttention(
            vllm_config=vllm_config,
            prefix=f"{prefix}.attn",
            num_heads=heads.count,
            num_kv_heads=kv_heads.count,
            head_dim=dim,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            qk_norm_eps=arch.qk_norm_eps,
            rope_base=arch.rope_base,
            k_shift=arch.k_shift,
            v_shift=arch.v_shift,
            gate_dtype=torch.float32 if constant else None,
            log_pruning_tolerance=arch.log_pruning_tolerance,
            bounded_by=self._bounding_weights,
            logit_bound=self._logit_bound,
        )

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Compute attention for T tokens.

        Args:
            positions: [T].
            x: [T, hidden], normed.

        Returns:
            The output [T, hidden].
        """
        parts = self._project(x)
        q = parts["q"]
        if self.q_norm is not None:
            q = self.q_norm(q).to(x.dtype).flatten(1)
        if self.arch.rope_base is not None:
            heads, dim = self.heads.count, self.arch.head_dim
            q = rotate(q.reshape(-1, heads, dim), positions, self.arch.rope_base).flatten(1)
        gate = self._gate_logits(parts)
        out = self.attn(q, parts["k"], parts["v"], gate, parts.get("k_shift"), parts.get("v_shift"))
        out, _ = self.o_proj(self._gate_output(out, parts.get("output_gate")))
        return out

    def _project(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map x [T, hidden] to everything that is computed from it, by name: [T, the rank's heads * width] each."""
        if self._sizes is None:
            return self.in_proj(x)
        out, _ = self.in_proj(x)
        parts = dict(zip(self._sizes, out.split(list(self._sizes.values()), -1)))
        return parts if self.gate_proj is None else parts | self.gate_proj(x)

    def arrange_heads(self, gate: torch.Tensor | None, bias: torch.Tensor, input_norm: torch.Tensor | None) -> None:
        """Choose this rank's heads so that all ranks forget equally much. Call it before weights are filled in.

        Args:
            gate: [all heads, hidden] weight of the forget gates' projection; None if the gates are constants.
            bias: [all heads] bias of the gates.
            input_norm: [hidden] weight of the norm before the projection; None if ``gate`` is None.
        """
        ranks, groups = get_tensor_model_parallel_world_size(), self.arch.num_heads // self.arch.num_kv_heads
        if ranks == 1 or ranks > self.arch.num_kv_heads:
            return
        order = deal(memory_score(gate, bias, input_norm, groups), ranks, self.layer)
        own = self.kv_heads.count * get_tensor_model_parallel_rank()
        self.kv_heads.heads = order[own : own + self.kv_heads.count]
        self.head_order = [head * groups + g for head in order for g in range(groups)]
        own *= groups
        self.heads.heads = self.head_order[own : own + self.heads.count]

    def arrange_output(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the output projection [hidden, all heads * d], its columns in the order of the ranks' heads."""
        return weight.unflatten(1, (self.arch.num_heads, -1))[:, self.head_order].flatten(1)

    def _gate_logits(self, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return x [T, heads] with log f = logsigmoid(x): float32 if constant, else in the model's dtype."""
        if "forget_gate" in parts:
            return parts["forget_gate"]
        tokens = parts["q"].shape[0]
        if self.forget_bias is not None:
            return self.forget_bias.expand(tokens, -1)
        return parts["q"].new_full((tokens, self.heads.count), math.inf)

    def _gate_output(self, out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Apply the output norm and the gate to ``out`` [T, heads * d] in float32, and round once."""
        if self.output_norm is None and gate is None:
            return out
        wide = out.float() if self.output_norm is None else self.output_norm(out).flatten(1)
        if gate is not None:
            gate = gate.float()
            wide = wide * (gate.sigmoid() if self.arch.output_gate == "sigmoid" else nn.functional.silu(gate))
        return wide.to(out.dtype)

    def _bounding_weights(self) -> list[torch.Tensor]:
        """Return the weights that the bound of the logits follows from."""
        if self.q_norm is not None and self.k_norm is not None:
            return [self.q_norm.weight, self.k_norm.weight]
        return [self._input_norm(), *self.in_proj.parameters()]

    def _logit_bound(self) -> torch.Tensor:
        """Return how large the logits can get: U of each query head, [heads] float32."""
        if self.q_norm is not None and self.k_norm is not None:
            return qk_norm_bound(self.q_norm.weight, self.k_norm.weight)
        layer, dim, hidden = self.in_proj, self.arch.head_dim, self.arch.hidden_size
        weight = layer.weight if isinstance(layer, HeadProjection) else used_weight(layer)
        w_q, w_k = (layer.part(weight, name).reshape(-1, dim, hidden) for name in "qk")
        b_q = b_k = None
        if self.arch.qkv_bias:
            assert layer.bias is not None
            b_q, b_k = (layer.part(layer.bias, name).view(-1, dim) for name in "qk")
        rotated, norm = self.arch.rope_base is not None, self._input_norm()
        return projection_bound(w_q, w_k, norm, b_q, b_k, rotated=rotated, rounding=self._rounding(norm))

    def _rounding(self, norm: torch.Tensor) -> tuple[float, float] | None:
        """Return how the projections round their input, given its norm's weight; None if they do not."""
        if isinstance(self.in_proj, HeadProjection) or not is_quantised(self.in_proj):
            return None
        largest = norm.abs().max().item() * self.arch.hidden_size**0.5
        found = input_rounding(self.in_proj, largest)
        if found is None:
            raise ValueError(
                "In vllm-fox, Forgetting Transformers without QK-norm do not support weights that "
                f"{type(self.in_proj.quant_method).__name__} has quantised, since it is not known how it rounds "
                "inputs, and pruning has to be bounded: use float8 or symmetric 8-bit integers."
            )
        return found


class ForgettingTransformerBlock(nn.Module):
    """One layer: normed attention and normed MLP, each added to the residual stream."""

    def __init__(self, vllm_config: VllmConfig, arch: Architecture, prefix: str) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        # Passed as a function, because the norm is a module of this block and not of its attention.
        self.attn = ForgettingSelfAttention(
            vllm_config, arch, prefix=f"{prefix}.attn", input_norm=lambda: self.attn_norm.weight
        )
        self.mlp_norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps)
        self.mlp = GatedMLP(vllm_config, arch, prefix=f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer on T tokens.

        Args:
            positions: [T].
            x: [T, hidden] output of the layer before.
            residual: [T, hidden] residual stream before ``x`` is added; None in the first layer.

        Returns:
            This layer's output, and the residual stream before it is added.
        """
        if residual is None:
            residual = x
            x = self.attn_norm(x)
        else:
            x, residual = self.attn_norm(x, residual)
        x = self.attn(positions, x)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    }
)
class ForgettingTransformerModel(nn.Module):
    """Embeddings, layers and final norm, or a pipeline stage's part of them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        arch, stage = Architecture.from_config(vllm_config.model_config.hf_config), get_pp_group()
        self.embeddings: nn.Module = PPMissingLayer()
        if stage.is_first_rank or (stage.is_last_rank and arch.tied_embeddings):
            self.embeddings = VocabParallelEmbedding(
                arch.vocab_size, arch.hidden_size, prefix=f"{prefix}.embeddings"
            )
        self.first_layer, self.end_layer, self.layers = make_layers(
            arch.num_layers,
            lambda prefix: ForgettingTransformerBlock(vllm_config, arch, prefix=prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(arch.hidden_size, eps=arch.norm_eps) if stage.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], arch.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [T] to embeddings [T, hidden]."""
        return self.embeddings(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Compute the hidden states of T tokens.

        Args:
            input_ids: [T] token ids; read on the first pipeline stage, unless ``inputs_embeds`` is given.
            positions: [T].
            intermediate_tensors: what the stage before has returned; None on the first stage.
            inputs_embeds: [T, hidden] embeddings instead of token ids.

        Returns:
            Hidden states [T, hidden] on the last stage, else what the next stage needs.
        """
        residual: torch.Tensor | None = None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        elif inputs_embeds is not None:
            x = inputs_embeds
        else:
            assert input_ids is not None
            x = self.embed_input_ids(input_ids)
        for layer in islice(self.layers, self.first_layer, self.end_layer):
            x, residual = layer(positions, x, residual)
        if not get_pp_group().is_last_rank:
            assert residual is not None
            return IntermediateTensors({"hidden_states": x, "residual": residual})
        x, _ = self.norm(x, residual)
        return x


class ForgettingTransformerForCausalLM(nn.Module, SupportsPP, SupportsLoRA):
    """A FoX language model of either checkpoint dialect, as vLLM loads and runs it."""

    # Load only safetensors, which hold no code, and ignore other .safetensors files beside the model.
    fall_back_to_pt_during_load: ClassVar[bool] = False
    allow_patterns_overrides: ClassVar[list[str]] = CHECKPOINT_FILES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.arch = Architecture.from_config(self.config)
        self._gates_apart = separates_gates(vllm_config)
        if vllm_config.quant_config is not None:
            # A quantisation config names layers as the checkpoint does.
            vllm_config.quant_config.packed_modules_mapping = parts_of(self.arch)
        # Adapters do so too. vLLM knows projections by the last part of their names.
        renamed = adapter_names(self.arch)
        self.hf_to_vllm_mapper = WeightsMapper(orig_to_new_substr=renamed)
        self.packed_modules_mapping = {
            layer: [renamed.get(f".{name}", f".{name}").lstrip(".") for name in names]
            for layer, names in parts_of(self.arch).items()
        }
        self.model = ForgettingTransformerModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                self.arch.vocab_size, self.arch.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            self.lm_head = head
            if isinstance(self.model.embeddings, VocabParallelEmbedding) and self.arch.tied_embeddings:
                self.lm_head = head.tie_weights(self.model.embeddings)
        self.logits_processor = LogitsProcessor(self.arch.vocab_size)
        expected: dict[str, Any] = expected_weights(self.arch)
        self._stored_names = WeightsMapper()
        if vllm_config.quant_config is not None:
            # Without those that the method does not need.
            self._stored_names = vllm_config.quant_config.get_checkpoint_weight_mapper()
            expected = as_quantised(self, expected, partial(layer_of, self.arch))
        # Quantised weights are not always stored head by head, and adapters are in the checkpoint's order.
        quantised = any(isinstance(one, Stored) and one.is_quantised for one in expected.values())
        self._keep_order = quantised or vllm_config.lora_config is not None
        self.loader = CheckpointLoader(vllm_config, expected, f"{self.arch.dialect} dialect")

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids [T] to embeddings [T, hidden]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Compute hidden states (see :meth:`ForgettingTransformerModel.forward`)."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Map hidden states [N, hidden] to logits [N, vocab], or to None on ranks that do not sample."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint, or a part of one later (see :func:`.weights.load_checkpoint`)."""
        attention: dict[int, ForgettingSelfAttention] = {}
        for index in range(self.model.first_layer, self.model.end_layer):
            block = self.model.layers[index]
            assert isinstance(block, ForgettingTransformerBlock)
            attention[index] = block.attn
        is_update = self.loader.has_weights
        filled = load_checkpoint(
            self.loader,
            self,
            self.arch,
            attention,
            self._stored_names.apply(weights),
            gates_apart=self._gates_apart,
            keep_order=self._keep_order,
        )
        if is_update:  # after the first load vLLM has the layers follow
            for one in attention.values():
                one.attn.follow_weights()
        return filled
