"""The attention layer that the model calls, and the operator that stands for it in compiled graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_fox.kernels.paged import PageFormat, Pages, PageTable
from vllm_fox.pages.spec import make_spec
from vllm_fox.settings import FoxSettings

from .backend import FoxAttentionBackend, FoxMetadata
from .implementation import ForgettingAttentionImpl, StepInputs


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
        self.token_shift = k_shift or v_shift
        assert isinstance(vllm_config.model_config.dtype, torch.dtype)
        self.dtype = vllm_config.model_config.dtype
        settings = FoxSettings.from_vllm_config(vllm_config)
        self.release = settings.release
        self.tolerance = settings.tolerance(log_pruning_tolerance)
        self.page_size = vllm_config.cache_config.block_size
        self.max_model_len = vllm_config.model_config.max_model_len
        self.impl = ForgettingAttentionImpl(head_dim**-0.5, k_norm, qk_norm_eps, rope_base)
        self.register_buffer("threshold", torch.full((num_kv_heads, self.num_gates), -math.inf), persistent=False)
        self.kv_cache = torch.tensor([])
        self._pages: Pages | None = None
        self._table: PageTable | None = None

        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        self._index = sum(isinstance(layer, ForgettingAttention) for layer in layers.values())
        layers[prefix] = self

    def set_logit_bound(self, bound: torch.Tensor) -> None:
        """Fix the pruning threshold ``-2U - log L + log eps`` (ACP, eq. 5), once weights are known.

        L is the longest context that the engine admits, so that a page dead now is dead for all queries to come.

        Args:
            bound: [num_heads] float32, U >= max |q . k| / sqrt(d) for every query and key there can be.
        """
        if self.tolerance is None:
            return
        # q and k are rounded to the model's dtype after the bound was proved for exact ones.
        rounding = (1.0 + torch.finfo(self.dtype).eps) ** 2
        limit = -2.0 * rounding * bound.double() - math.log(self.max_model_len) + self.tolerance
        self.threshold.copy_(limit.view(self.num_kv_heads, self.num_gates))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_f: torch.Tensor,
        shift_k: torch.Tensor | None,
        shift_v: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend (T tokens, Hq query heads, H KV heads on this rank).

        Args:
            q: [T, Hq * d], normed and rotated.
            k, v: [T, H * d] as projected.
            log_f: [T, Hq] float32, at most 0.
            shift_k, shift_v: [T, H] float32 in [0, 1], or None.

        Returns:
            [T, Hq * d].
        """
        out = torch.empty_like(q)
        torch.ops.vllm_fox.forgetting_attention(q, k, v, log_f, shift_k, shift_v, out, self.layer_name)
        return out

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_f: torch.Tensor,
        shift_k: torch.Tensor | None,
        shift_v: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """The operator's body: everything between the projections and the output gate."""
        metadata: Any = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = metadata[self.layer_name]
        if metadata is None or self._table is None:  # memory profiling: the page table is not there yet
            out.zero_()
            return
        assert isinstance(metadata, FoxMetadata) and self._pages is not None
        tokens, heads, groups = metadata.batch.num_tokens, self.num_kv_heads, self.num_gates
        out[tokens:] = 0

        def rows(x: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
            return None if x is None else x[:tokens].view(tokens, *shape)

        step = StepInputs(
            q=q[:tokens].view(tokens, heads, groups, self.head_dim),
            k=k[:tokens].view(tokens, heads, self.head_dim),
            v=v[:tokens].view(tokens, heads, self.head_dim),
            log_f=log_f[:tokens].view(tokens, heads, groups),
            shift_k=rows(shift_k, heads),
            shift_v=rows(shift_v, heads),
        )
        self.impl.forward(
            step,
            metadata,
            self._pages,
            self._table,
            self._streams,
            self.threshold,
            out[:tokens].view(tokens, heads, groups, self.head_dim),
        )

    # What vLLM calls.

    def get_attn_backend(self) -> type[AttentionBackend]:
        return FoxAttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        layers = vllm_config.compilation_config.static_forward_context.values()
        return make_spec(
            vllm_config,
            num_kv_heads=self.num_kv_heads,
            num_gates=self.num_gates,
            head_dim=self.head_dim,
            dtype=self.dtype,
            token_shift=self.token_shift,
            num_layers=sum(isinstance(layer, ForgettingAttention) for layer in layers),
            release=self.release,
        )

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the whole cache, of which vLLM passes this layer's view: all streams share one pool of pages."""
        self.kv_cache = kv_cache
        storage = kv_cache.untyped_storage()
        pool = torch.empty(0, dtype=torch.uint8, device=kv_cache.device).set_(storage)
        self._pages = PageFormat(self.page_size, self.head_dim, self.dtype, self.num_gates, self.token_shift).view(
            pool
        )

    def bind_page_table(self, table: PageTable) -> None:
        """Take the worker's page table (called by the connector)."""
        self._table = table
        first, device = self._index * self.num_kv_heads, table.entries.device
        self._streams = torch.arange(first, first + self.num_kv_heads, device=device)


def forgetting_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """The operator ``vllm_fox::forgetting_attention``; finds its layer by name."""
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.attend(q, k, v, log_f, shift_k, shift_v, out)


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    return None


_library = torch.library.Library("vllm_fox", "FRAGMENT")
direct_register_custom_op(
    op_name="forgetting_attention",
    op_func=forgetting_attention,
    mutates_args=["out"],
    fake_impl=_fake,
    target_lib=_library,
)
