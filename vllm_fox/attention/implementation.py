"""One layer's attention in one step: the leaf functions in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_fox.kernels.attention import decode_attention, prefill_attention
from vllm_fox.kernels.cache_write import cache_write
from vllm_fox.kernels.live_range import live_range
from vllm_fox.kernels.paged import Pages, PageTable

if TYPE_CHECKING:
    from .backend import FoxMetadata


@dataclass
class StepInputs:
    """What the model hands to a layer's attention (T tokens, H KV heads, G query heads a KV head).

    Attributes:
        q: [T, H, G, d], normed and rotated.
        k, v: [T, H, d] as projected.
        log_f: [T, H, G] float32.
        shift_k, shift_v: [T, H] float32, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_f: torch.Tensor
    shift_k: torch.Tensor | None
    shift_v: torch.Tensor | None


@dataclass
class ForgettingAttentionImpl:
    """Constants of a layer (see :class:`~vllm_fox.attention.layer.ForgettingAttention`).

    Attributes:
        scale: of the logits.
        k_norm: [H, d] or None.
        norm_eps: of that norm.
        rope_base: theta or None.
    """

    scale: float
    k_norm: torch.Tensor | None
    norm_eps: float
    rope_base: float | None

    # vLLM's capability checks.
    supports_pcp = False
    supports_dcp = False

    def forward(
        self,
        step: StepInputs,
        metadata: FoxMetadata,
        pages: Pages,
        table: PageTable,
        streams: torch.Tensor,
        threshold: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Write the new tokens, find the live ranges, attend.

        Args:
            streams: [H] the layer's streams in the page table.
            threshold: [H, G] pruning threshold.
            out: [T, H, G, d], written.
        """
        batch = metadata.batch
        cache_write(
            pages,
            table,
            batch,
            streams,
            step.k,
            step.v,
            step.log_f,
            step.shift_k,
            step.shift_v,
            self.k_norm,
            self.norm_eps,
            self.rope_base,
        )
        live = live_range(pages, table, batch, streams, threshold)
        if metadata.prefill_rows:
            prefill_attention(
                pages,
                table,
                batch,
                streams,
                live,
                threshold,
                step.q,
                self.scale,
                metadata.prefill_rows,
                out,
            )
        if metadata.decode_rows:
            decode_attention(pages, table, batch, streams, live, step.q, self.scale, metadata.decode_rows, out)
