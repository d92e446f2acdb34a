"""Forgetting attention of one layer in one step, as calls of the leaf functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_fox.attention.step import Formula, WorkerState
from vllm_fox.kernels.forgetting import decode, prefill
from vllm_fox.kernels.forgetting.cache_write import cache_write
from vllm_fox.kernels.forgetting.live_range import first_live_at, live_range
from vllm_fox.kernels.forgetting.pages import PLAIN_EXP_BOUND, ForgettingPages
from vllm_fox.kernels.paged import Batch, PageTable

if TYPE_CHECKING:
    from vllm_fox.kernels.forgetting.prefill.plan import PrefillPlan


class ForgettingState(WorkerState):
    """State that the layers of one worker share from step to step.

    Args:
        table: the worker's page table.
        thresholds: pruning thresholds of the worker's layers, each [H, G] float32, in order.
        logit_bounds: upper bound of ``|q . k| / sqrt(d)`` over each layer's heads; inf if none is known.
        pages: the page pool.
        max_rows: most rows that a step can have.
        unsettled: so many of a request's newest tokens forget nothing yet, as they may be rejected.
    """

    def __init__(
        self,
        table: PageTable,
        thresholds: list[torch.Tensor],
        logit_bounds: list[float],
        pages: ForgettingPages,
        max_rows: int,
        unsettled: int = 0,
    ) -> None:
        super().__init__(table)
        self.pages, self.unsettled = pages, unsettled
        self._logit_bounds = list(logit_bounds)
        # Whether exponentials of logits need no running maximum. Every layer of a prompt's step reads it.
        self.bounded = max(logit_bounds) <= PLAIN_EXP_BOUND
        self.thresholds = torch.stack(thresholds)
        layers, heads, groups = self.thresholds.shape
        self.prefill_workspace: PrefillPlan | None = None
        self.decode_workspace = decode.make_workspace(
            device=table.entries.device,
            layers=layers,
            heads=heads,
            groups=groups,
            head_dim=pages.k.shape[-1],
            page_size=pages.page_size,
            dtype=pages.dtype,
            max_rows=max_rows,
        )

    def set_bound(self, layer: int, threshold: torch.Tensor, logit_bound: float) -> None:
        """Follow new weights of a layer, whose pages stay as they are.

        Args:
            threshold: [H, G] float32. CUDA graphs hold the address of the one in use, so it is written over.
            logit_bound: upper bound of ``|q . k| / sqrt(d)``.
        """
        self.thresholds[layer].copy_(threshold)
        self._logit_bounds[layer] = logit_bound
        self.bounded = max(self._logit_bounds) <= PLAIN_EXP_BOUND

    def begin_step(self, batch: Batch) -> None:
        if batch.work is not None:
            self.prefill_workspace = prefill.make_workspace(batch.work, *self.thresholds.shape[1:])
        if self.decode_workspace is not None and batch.has_decode:
            self.decode_workspace.update(self.table, batch)

    def end_step(self, batch: Batch) -> None:
        """Find pages that no later query needs. The step itself used the live ranges that the one before found."""
        live_range(self.pages, self.table, batch, self.thresholds.flatten(0, 1), self.unsettled)

    def first_live_at(self, slots: torch.Tensor, num_pages: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        thresholds = self.thresholds.flatten(0, 1)
        return first_live_at(self.pages, self.table, thresholds, slots=slots, num_pages=num_pages, before=before)

    def lower_ends(self, batch: Batch, row: int, ends: torch.Tensor) -> None:
        """Find what is dead at each page boundary that the step has reached."""
        size, length = self.pages.page_size, int(batch.seq_lens[row])
        before = length - batch.query_lens_host[row]
        reached = torch.arange(before // size + 1, length // size + 1, dtype=torch.int32, device=self.table.device)
        if not len(reached):
            return
        slots = batch.slots[row].expand(len(reached))
        first = self.first_live_at(slots, reached, self.table.first_live[slots.long()]).cpu()
        position = torch.arange(ends.shape[1])
        for boundary, page in zip(reached.tolist(), first, strict=True):
            dead = position < page[:, None] * size
            ends.copy_(torch.where(dead, ends.clamp(max=boundary * size), ends))


@dataclass
class ForgettingFormula(Formula[ForgettingState]):
    """Attention of a layer with H KV heads, G query heads for each KV head, and head size d.

    Attributes:
        scale: factor of the logits.
        k_norm: [H, d] RMS-norm weight of k after token shift, or None.
        norm_eps: epsilon of that norm.
        rope_base: theta of RoPE, or None.
        shift_k, shift_v: whether k and v are shifted.
    """

    scale: float
    k_norm: torch.Tensor | None
    norm_eps: float
    rope_base: float | None
    shift_k: bool
    shift_v: bool

    def forward(
        self, inputs: Sequence[torch.Tensor], batch: Batch, state: ForgettingState, out: torch.Tensor
    ) -> None:
        """Write T new tokens into their pages, then compute their attention.

        Args:
            inputs: q [T, H * G * d], normed and rotated; k and v [T, H * d] as projected; the forget gate's logits
                [T, H * G]; and, where k or v is shifted, its logits of the token shift [T, H]. Tensors may be parts
                of wider ones: any stride over tokens, dense within a token.
            out: [T, H * G * d]; the output is written here.
        """
        pages, table, layer = state.pages, state.table, self.layer
        _, heads, groups = state.thresholds.shape
        tokens, dim = batch.num_tokens, pages.k.shape[-1]
        flat_q, k, v, gate, *shifts = inputs
        q = flat_q.view(tokens, heads, groups, dim)
        out = out.view(tokens, heads, groups, dim)
        shift_k = shifts[0] if self.shift_k else None
        shift_v = shifts[-1] if self.shift_v else None
        cache_write(
            pages,
            table,
            batch,
            layer,
            k=k.view(tokens, heads, dim),
            v=v.view(tokens, heads, dim),
            gate=gate.view(tokens, heads, groups),
            shift_k=shift_k,
            shift_v=shift_v,
            k_norm=self.k_norm,
            norm_eps=self.norm_eps,
            rope_base=self.rope_base,
        )
        if batch.work is not None:
            threshold = state.thresholds[layer]
            prefill.prefill_attention(
                pages, table, batch, layer, threshold, q, self.scale, state.bounded, out, state.prefill_workspace
            )
        if batch.has_decode:
            decode.decode_attention(pages, table, batch, layer, q, self.scale, out, state.decode_workspace)
