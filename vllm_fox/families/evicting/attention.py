"""Attention of one layer over the tokens that its KV heads have not evicted, as calls of the leaf functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_fox.attention.step import Formula, WorkerState
from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.kernels.subset import attention
from vllm_fox.kernels.subset.compaction import compact
from vllm_fox.kernels.subset.pages import Evictions, SubsetPages, lower_ends
from vllm_fox.kernels.subset.write import subset_write


class EvictingState(WorkerState):
    """State that the layers of one worker share from step to step.

    Args:
        table: the worker's page table.
        pages: the page pool.
        layers: of the worker.
        heads, groups: KV heads of a layer on this worker, and query heads for each.
        max_rows: most rows that a step can have.
        max_model_len: most tokens of a request.
        unsettled: so many of a request's newest tokens evict nothing yet, as they may be rejected.
    """

    def __init__(
        self,
        table: PageTable,
        pages: SubsetPages,
        *,
        layers: int,
        heads: int,
        groups: int,
        max_rows: int,
        max_model_len: int,
        unsettled: int = 0,
    ) -> None:
        super().__init__(table)
        self.pages, self.unsettled = pages, unsettled
        self.workspace = attention.make_workspace(
            pages, layers=layers, streams=heads, groups=groups, max_rows=max_rows, max_model_len=max_model_len
        )

    def begin_step(self, batch: Batch) -> None:
        if self.workspace is not None and batch.has_decode:
            self.workspace.update(self.table, batch)

    def end_step(self, batch: Batch) -> None:
        """Move live tokens together, so that pages become free: whenever a request has filled a page."""
        compact(self.pages, self.table, batch, self.pages.page_size, self.unsettled)

    def lower_ends(self, batch: Batch, row: int, ends: torch.Tensor) -> None:
        lower_ends(self.pages, self.table, batch, row, ends)


@dataclass
class EvictingFormula(Formula[EvictingState]):
    """Attention of a layer with H KV heads, G query heads for each, and head size d. A KV head is a stream.

    Attributes:
        scale: factor of the logits.
        window: W, of evicted tokens.
        shift: 1 if a token decides about the one before it, 0 if about itself.
    """

    scale: float
    window: int
    shift: int

    def forward(
        self, inputs: Sequence[torch.Tensor], batch: Batch, state: EvictingState, out: torch.Tensor
    ) -> None:
        """Write T new tokens and what they decide into their pages, and compute attention over what is left.

        ``o_i = sum_j softmax_j(scale * q_i . k_j) v_j`` over the tokens j <= i that are not evicted, or in the
        window: ``i - j <= W``.

        Args:
            inputs: q [T, H * G * d], k and v [T, H * d], rotated; decisions [T, H] bool.
            out: [T, H * G * d]; the output is written here.
        """
        pages, table, layer = state.pages, state.table, self.layer
        q, k, v, evicts = inputs
        dim = pages.k.shape[-1]
        k, v = (x.unflatten(1, (-1, 1, dim)) for x in (k, v))
        heads = k.shape[1]
        q, out = (x.unflatten(1, (heads, 1, -1, dim)) for x in (q, out))
        evictions = Evictions(evicts, self.window, self.shift)
        subset_write(pages, table, batch, layer, k=k, v=v, int_k=None, evictions=evictions)
        attention.subset_attention(pages, table, batch, layer, q, self.scale, out, state.workspace)
