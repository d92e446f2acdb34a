"""The attention layer that the model calls, and the operator that stands for it in compiled graphs."""

from __future__ import annotations

import math

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_fox.kernels.paged import FP8, LIVE_RANGE_PERIOD, PageFormat, PageTable
from vllm_fox.models.bounds import pruning_threshold, with_rounding
from vllm_fox.settings import FoxSettings

from .backend import FoxAttentionBackend
from .implementation import ForgettingAttentionImpl, StepInputs, WorkerState
from .paged_layer import OPERATORS, PagedAttention
from .warm_up import warm_up


class ForgettingAttention(PagedAttention[WorkerState]):
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
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        groups = num_heads // num_kv_heads
        kv_dtype = FP8 if vllm_config.cache_config.cache_dtype.startswith("fp8") else dtype
        page_size = vllm_config.cache_config.block_size
        super().__init__(
            vllm_config,
            prefix,
            page_format=PageFormat(page_size, head_dim, dtype, groups, k_shift or v_shift, kv_dtype),
            streams=num_kv_heads,
            head_size=head_dim,
            report_period=LIVE_RANGE_PERIOD,
        )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.num_gates = groups
        self.shift = (k_shift, v_shift)
        self.dtype, self.kv_dtype = dtype, kv_dtype
        self.tolerance = FoxSettings.from_vllm_config(vllm_config).tolerance(log_pruning_tolerance)
        self.max_model_len = vllm_config.model_config.max_model_len
        # Largest |q . k| / sqrt(d) that there can be; known once weights are loaded.
        self.logit_bound = math.inf
        self.register_buffer("threshold", torch.full((num_kv_heads, self.num_gates), -math.inf), persistent=False)
        self.impl = ForgettingAttentionImpl(self.index, head_dim**-0.5, k_norm, qk_norm_eps, rope_base)

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
        found = self.step()
        if found is None:
            out.zero_()
            return
        batch, state = found
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
        self.impl.forward(step, batch, state, out)

    def get_attn_backend(self) -> type[FoxAttentionBackend]:
        return FoxAttentionBackend

    @staticmethod
    def make_state(layers: list[ForgettingAttention], table: PageTable, max_rows: int) -> WorkerState:  # type: ignore[override]
        """What a worker's layers share; compiles what a step may need."""
        state = WorkerState(
            table,
            [layer.threshold for layer in layers],
            max(layer.logit_bound for layer in layers),
            layers[0].page_format.view(layers[0].pool()),
            max_rows,
        )
        warm_up(layers[0].impl, state, layers[0].dtype, layers[0].shift)
        return state


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


direct_register_custom_op(
    op_name="forgetting_attention",
    op_func=forgetting_attention,
    mutates_args=["out"],
    fake_impl=_fake,
    target_lib=OPERATORS,
)
