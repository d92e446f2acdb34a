"""The attention layer that the model calls, and the operator that stands for it in compiled graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import library, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_fox.kernels.paged import FP8, PageFormat, Pages, PageTable
from vllm_fox.models.bounds import pruning_threshold, with_rounding
from vllm_fox.pages.spec import make_spec
from vllm_fox.settings import FoxSettings

from .backend import FoxAttentionBackend, FoxMetadata
from .implementation import ForgettingAttentionImpl, StepInputs, WorkerState
from .warm_up import warm_up


class ForgettingAttention(nn.Module, AttentionLayerBase):
    """Forgetting attention of one layer over head-paged, pruned KV.

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's name; unique.
        num_heads, num_kv_heads: on this tensor-parallel rank.
        head_dim: d.
        k_norm: [num_kv_heads, d] RMS-norm weight applied to k after token shift, or None.
        qk_norm_eps: of that norm.
        rope_base: theta of RoPE on k, or None.
        k_shift, v_shift: whether the model shifts k or v.
        log_pruning_tolerance: the checkpoint's log eps, or None.
    """

    impl: ForgettingAttentionImpl  # type: ignore[assignment]  # its forward takes pages, not a layer's cache
    threshold: torch.Tensor

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        k_norm: nn.Parameter | None,
        qk_norm_eps: float,
        rope_base: float | None,
        k_shift: bool,
        v_shift: bool,
        log_pruning_tolerance: float | None,
    ) -> None:
        super().__init__()
        self.layer_name = prefix
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.num_gates = num_heads // num_kv_heads
        self.shift = (k_shift, v_shift)
        assert isinstance(vllm_config.model_config.dtype, torch.dtype)
        self.dtype = vllm_config.model_config.dtype
        settings = FoxSettings.from_vllm_config(vllm_config)
        self.release = settings.release
        self.tolerance = settings.tolerance(log_pruning_tolerance)
        self.page_size = vllm_config.cache_config.block_size
        self.max_model_len = vllm_config.model_config.max_model_len
        self.kv_dtype = FP8 if vllm_config.cache_config.cache_dtype.startswith("fp8") else self.dtype
        # Largest |q . k| / sqrt(d) that there can be; known once weights are loaded.
        self.logit_bound = math.inf
        self.register_buffer("threshold", torch.full((num_kv_heads, self.num_gates), -math.inf), persistent=False)
        self.kv_cache = torch.tensor([])
        self._pages: Pages | None = None
        self._state: WorkerState | None = None

        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        index = sum(isinstance(layer, ForgettingAttention) for layer in layers.values())
        self.impl = ForgettingAttentionImpl(index, head_dim**-0.5, k_norm, qk_norm_eps, rope_base)
        layers[prefix] = self

    def set_logit_bound(self, bound: torch.Tensor) -> None:
        """Fix the pruning threshold ``-2U - log L + log eps`` (ACP, eq. 5), once weights are known.

        L is the longest context that the engine admits, so that a page dead now is dead for all queries to come.

        Args:
            bound: [num_heads] float32, U >= max |q . k| / sqrt(d) for every query and key there can be.
        """
        bound = with_rounding(bound, self.dtype, self.kv_dtype)
        self.logit_bound = bound.max().item()
        if self.tolerance is None:
            return
        limit = pruning_threshold(bound, self.max_model_len, self.tolerance)
        self.threshold.copy_(limit.view(self.num_kv_heads, self.num_gates))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        shift_k: torch.Tensor | None,
        shift_v: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend (T tokens, Hq query heads, H KV heads on this rank).

        Args:
            q: [T, Hq * d], normed and rotated.
            k, v: [T, H * d] as projected.
            gate: [T, Hq] logits of the forget gate.
            shift_k, shift_v: [T, H] logits of the token shift, or None.

        Returns:
            [T, Hq * d].
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        torch.ops.vllm_fox.forgetting_attention(q, k, v, gate, shift_k, shift_v, out, self.layer_name)
        return out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        shift_k: torch.Tensor | None,
        shift_v: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The operator's body: everything between the projections and the output gate."""
        metadata: Any = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[self.layer_name]
        if metadata is None or self._state is None:  # memory profiling: the page table is not there yet
            out.zero_()
            return
        assert isinstance(metadata, FoxMetadata)
        batch = metadata.batch
        tokens, heads, groups = batch.num_tokens, self.num_kv_heads, self.num_gates
        if tokens < len(out):  # rows of padding
            out[tokens:] = 0
            q, k, v, gate, out = q[:tokens], k[:tokens], v[:tokens], gate[:tokens], out[:tokens]
            shift_k = None if shift_k is None else shift_k[:tokens]
            shift_v = None if shift_v is None else shift_v[:tokens]
        step = StepInputs(
            q=q.view(tokens, heads, groups, self.head_dim),
            k=k.view(tokens, heads, self.head_dim),
            v=v.view(tokens, heads, self.head_dim),
            gate=gate.view(tokens, heads, groups),
            shift_k=shift_k,
            shift_v=shift_v,
        )
        out = out.view(tokens, heads, groups, self.head_dim)
        self.impl.forward(step, batch, self._state, out)

    # What vLLM calls.

    def get_attn_backend(self) -> type[AttentionBackend]:
        return FoxAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return make_spec(
            vllm_config,
            num_kv_heads=self.num_kv_heads,
            num_gates=self.num_gates,
            head_dim=self.head_dim,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            token_shift=any(self.shift),
            release=self.release,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the whole cache, of which vLLM passes this layer's view: all streams share one pool of pages."""
        self.kv_cache = kv_cache
        storage = kv_cache.untyped_storage()
        pool = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(storage)
        form = PageFormat(self.page_size, self.head_dim, self.dtype, self.num_gates, any(self.shift), self.kv_dtype)
        self._pages = form.view(pool)

    @staticmethod
    def bind_page_table(layers: list[ForgettingAttention], table: PageTable, max_rows: int) -> None:
        """Give a worker's layers its page table, and compile what a step may need (called by the connector).

        Args:
            layers: all of the worker's, in any order.
            max_rows: most requests of a step.
        """
        layers = sorted(layers, key=lambda layer: layer.impl.layer)
        pages = layers[0]._pages
        assert pages is not None
        state = WorkerState(
            table,
            [layer.threshold for layer in layers],
            max(layer.logit_bound for layer in layers),
            pages,
            max_rows,
        )
        for layer in layers:
            layer._state = state
        warm_up(layers[0].impl, state, layers[0].dtype, layers[0].shift)


def forgetting_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """The operator ``vllm_fox::forgetting_attention``; finds its layer by name."""
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.attend(q, k, v, gate, shift_k, shift_v, out)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    return None


_library = library.Library("vllm_fox", "FRAGMENT")
direct_register_custom_op(
    op_name="forgetting_attention",
    op_func=forgetting_attention,
    mutates_args=["out"],
    fake_impl=_fake,
    target_lib=_library,
)
