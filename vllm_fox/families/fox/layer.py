"""The attention layer of Forgetting Transformers, as the model calls it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_fox.attention.layer import PagedAttention
from vllm_fox.kernels.float8 import FP8
from vllm_fox.kernels.forgetting.pages import LIVE_RANGE_PERIOD, ForgettingPageFormat
from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.pages.spec import unsettled_tokens

from .attention import ForgettingFormula, ForgettingState
from .bounds import serving_threshold, with_rounding
from .settings import FoxSettings


class ForgettingAttention(PagedAttention[ForgettingState]):
    """Forgetting attention of one layer over pages of single KV heads, of which dead ones are pruned.

    Args:
        vllm_config: the engine's configuration.
        prefix: the layer's unique name.
        num_heads, num_kv_heads: numbers of heads on this tensor-parallel rank.
        head_dim: d, the size of a head.
        k_norm: [num_kv_heads, d] RMS-norm weight applied to k after token shift, or None.
        qk_norm_eps: epsilon of that norm.
        rope_base: theta of RoPE on k, or None.
        k_shift, v_shift: whether the model shifts k or v.
        gate_dtype: dtype of the forget gate's logits; None stands for the model's.
        log_pruning_tolerance: the checkpoint's log eps, or None.
        bounded_by: returns the weights that the bound of the logits follows from.
        logit_bound: computes it from them: [num_heads] float32, U >= |q . k| / sqrt(d) for every query and key
            that there can be.
    """

    impl: ForgettingFormula
    page_format: ForgettingPageFormat
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
        gate_dtype: torch.dtype | None,
        log_pruning_tolerance: float | None,
        bounded_by: Callable[[], list[torch.Tensor]],
        logit_bound: Callable[[], torch.Tensor],
    ) -> None:
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        groups = num_heads // num_kv_heads
        kv_dtype = FP8 if vllm_config.cache_config.cache_dtype.startswith("fp8") else dtype
        page_size = vllm_config.cache_config.block_size
        settings = FoxSettings.from_vllm_config(vllm_config)
        super().__init__(
            vllm_config,
            prefix,
            page_format=ForgettingPageFormat(
                page_size,
                head_dim,
                dtype,
                groups,
                k_shift or v_shift,
                kv_dtype,
                drafts=vllm_config.num_speculative_tokens,
            ),
            streams=num_kv_heads,
            head_size=head_dim,
            release=settings.release,
            report_period=LIVE_RANGE_PERIOD,
        )
        self.num_kv_heads, self.num_gates = num_kv_heads, groups
        self.gate_dtype = gate_dtype or dtype
        self.unsettled = unsettled_tokens(vllm_config)
        self.tolerance = settings.tolerance(log_pruning_tolerance)
        self.max_model_len = vllm_config.model_config.max_model_len
        self._bounded_by, self._bound_of_weights = bounded_by, logit_bound
        # Upper bound of |q . k| / sqrt(d), which is known once weights are loaded.
        self.logit_bound = math.inf
        # In the model's dtype, which vLLM makes the default, a threshold could be rounded up.
        never = torch.full((num_kv_heads, groups), -math.inf, dtype=torch.float32)
        self.register_buffer("threshold", never, persistent=False)
        self.impl = ForgettingFormula(
            self.index, head_dim**-0.5, k_norm, qk_norm_eps, rope_base, shift_k=k_shift, shift_v=v_shift
        )

    def source_weights(self) -> list[torch.Tensor]:
        return self._bounded_by()

    def follow_weights(self) -> None:
        """Compute the pruning threshold ``-2U - log L + log eps`` (ACP, eq. 5) from the weights."""
        if any(tensor.is_meta for tensor in (self.threshold, *self.source_weights())):
            return  # vLLM is reloading weights, and calls this again at the end
        bound = with_rounding(self._bound_of_weights(), self.page_format.dtype, self.page_format.kv_dtype)
        self.logit_bound = bound.max().item()
        if self.tolerance is not None:
            limit = serving_threshold(bound, self.max_model_len, self.tolerance)
            self.threshold.copy_(limit.view(self.num_kv_heads, self.num_gates))
        if self._state is not None:
            self._state.set_bound(self.index, self.threshold, self.logit_bound)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gate: torch.Tensor,
        shift_k: torch.Tensor | None,
        shift_v: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute attention for T tokens, with Hq query heads and H KV heads on this rank.

        Args:
            q: [T, Hq * d], normed and rotated.
            k, v: [T, H * d] as projected.
            gate: [T, Hq] logits of the forget gate, in ``gate_dtype``.
            shift_k, shift_v: [T, H] logits of the token shift; None without it.

        Returns:
            The output [T, Hq * d].
        """
        return self.run([q, k, v, gate, *(shift for shift in (shift_k, shift_v) if shift is not None)])

    @classmethod
    def make_state(cls, layers: list[ForgettingAttention], table: PageTable, max_rows: int) -> ForgettingState:
        one = layers[0]
        return ForgettingState(
            table,
            [layer.threshold for layer in layers],
            [layer.logit_bound for layer in layers],
            one.page_format.view(one.pool()),
            max_rows,
            one.unsettled,
        )

    def dry_inputs(self, tokens: int, device: torch.device) -> list[torch.Tensor]:
        heads, groups, dim = self.num_kv_heads, self.num_gates, self.page_format.head_dim
        dtype = self.page_format.dtype
        shapes = [(heads * groups * dim, dtype), (heads * dim, dtype), (heads * dim, dtype)]
        shapes += [(heads * groups, self.gate_dtype)]
        shapes += [(heads, dtype)] * (self.impl.shift_k + self.impl.shift_v)
        return [torch.zeros(tokens, width, dtype=kind, device=device) for width, kind in shapes]

    def warm_up_variants(
        self, inputs: list[torch.Tensor], batch: Batch, state: ForgettingState, out: torch.Tensor
    ) -> None:
        """Compile prefill also for long steps, in which it sorts its tiles, and live ranges of the past."""
        if batch.work is None:
            return
        state.first_live_at(batch.slots, torch.ones_like(batch.slots), state.table.first_live[:1])
        from vllm_fox.kernels.forgetting.prefill.plan import PrefillPlan

        plan = PrefillPlan(batch.work, self.num_kv_heads, self.num_gates, sort=True)
        state.prefill_workspace = plan
        self.impl.forward(inputs, batch, state, out)
