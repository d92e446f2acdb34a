"""One layer's attention in one step: the leaf functions in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_fox.kernels.cache_write import cache_write
from vllm_fox.kernels.decode_attention import decode_attention
from vllm_fox.kernels.decode_attention import make_plan as make_decode_plan
from vllm_fox.kernels.live_range import live_range
from vllm_fox.kernels.paged import PLAIN_EXP_BOUND, Batch, Pages, PageTable
from vllm_fox.kernels.prefill_attention import make_plan as make_prefill_plan
from vllm_fox.kernels.prefill_attention import prefill_attention

if TYPE_CHECKING:
    from vllm_fox.kernels.prefill_attention.plan import PrefillPlan


@dataclass
class StepInputs:
    """What the model hands to a layer's attention (T tokens, H KV heads, G query heads a KV head). Tensors may be
    parts of a wider one: any stride over tokens, dense within a token.

    Attributes:
        q: [T, H, G, d], normed and rotated.
        k, v: [T, H, d] as projected.
        gate: [T, H, G] logits of the forget gate.
        shift_k, shift_v: [T, H] logits of the token shift, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor
    shift_k: torch.Tensor | None
    shift_v: torch.Tensor | None


class WorkerState:
    """What the layers of one worker share from step to step.

    Args:
        table: the worker's page table.
        thresholds: pruning thresholds of its layers, each [H, G] float32, in order.
        logit_bound: upper bound of ``|q . k| / sqrt(d)`` over all its layers and heads; inf if none is known.
        pages: the page pool.
        max_rows: most rows that a step can have.
    """

    def __init__(
        self, table: PageTable, thresholds: list[torch.Tensor], logit_bound: float, pages: Pages, max_rows: int
    ) -> None:
        self.table, self.pages = table, pages
        self.bounded = logit_bound <= PLAIN_EXP_BOUND
        self.thresholds = torch.stack(thresholds)
        self.num_layers, heads, groups = self.thresholds.shape
        self.prefill_plan: PrefillPlan | None = None
        self.decode_plan = make_decode_plan(
            device=table.entries.device,
            layers=self.num_layers,
            heads=heads,
            groups=groups,
            head_dim=pages.k.shape[-1],
            page_size=pages.page_size,
            scaled=pages.scales is not None,
            max_rows=max_rows,
        )

    def begin_step(self, batch: Batch) -> None:
        """Before the first layer."""
        if batch.work is not None:
            self.prefill_plan = make_prefill_plan(batch.work, *self.thresholds.shape[1:])
        if self.decode_plan is not None and batch.has_decode:
            self.decode_plan.update(self.table, batch)

    def end_step(self, batch: Batch) -> None:
        """After the last layer: what no later query needs. A step itself reads what the one before it left."""
        live_range(self.pages, self.table, batch, self.thresholds.flatten(0, 1))


@dataclass
class ForgettingAttentionImpl:
    """Constants of a layer (see :class:`~vllm_fox.attention.layer.ForgettingAttention`).

    Attributes:
        layer: index of the layer on this worker.
        scale: of the logits.
        k_norm: [H, d] or None.
        norm_eps: of that norm.
        rope_base: theta or None.
    """

    layer: int
    scale: float
    k_norm: torch.Tensor | None
    norm_eps: float
    rope_base: float | None

    # vLLM's capability checks.
    supports_pcp = False
    supports_dcp = False

    def forward(self, step: StepInputs, batch: Batch, state: WorkerState, out: torch.Tensor) -> None:
        """Write the new tokens, then attend.

        Args:
            out: [T, H, G, d], written.
        """
        pages, table, layer = state.pages, state.table, self.layer
        if layer == 0:
            state.begin_step(batch)
        cache_write(
            pages,
            table,
            batch,
            layer,
            step.k,
            step.v,
            step.gate,
            step.shift_k,
            step.shift_v,
            self.k_norm,
            self.norm_eps,
            self.rope_base,
        )
        if batch.work is not None:
            threshold = state.thresholds[layer]
            prefill_attention(
                pages,
                table,
                batch,
                layer,
                threshold,
                step.q,
                self.scale,
                state.bounded,
                out,
                plan=state.prefill_plan,
            )
        if batch.has_decode:
            decode_attention(pages, table, batch, layer, step.q, self.scale, out, plan=state.decode_plan)
        if layer == state.num_layers - 1:
            state.end_step(batch)
