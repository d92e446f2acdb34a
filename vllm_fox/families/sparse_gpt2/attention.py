"""Attention of one layer with Dynamic Context Pruning in one step, as calls of the leaf functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_fox.attention.step import Formula, WorkerState
from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.kernels.subset import attention
from vllm_fox.kernels.subset.compaction import compact
from vllm_fox.kernels.subset.drop_times import drop_times
from vllm_fox.kernels.subset.pages import NEVER, SubsetPages, lower_ends
from vllm_fox.kernels.subset.write import subset_write


class SubsetState(WorkerState):
    """State that the layers of one worker share from step to step.

    Args:
        table: the worker's page table.
        pages: the page pool.
        layers: of the worker.
        max_rows: most rows that a step can have.
        max_model_len: most tokens of a request.
        propagate: whether what a layer drops is dropped in all layers above it.
    """

    def __init__(
        self,
        table: PageTable,
        pages: SubsetPages,
        layers: int,
        max_rows: int,
        max_model_len: int,
        propagate: bool,
    ) -> None:
        super().__init__(table)
        self.pages = pages
        device = pages.end.device
        shape = (max_rows, 1, max_model_len)
        self.ends = torch.full(shape, NEVER, dtype=torch.int32, device=device) if propagate else None
        self.workspace = attention.make_workspace(
            pages, layers=layers, streams=1, groups=1, max_rows=max_rows, max_model_len=max_model_len
        )

    def begin_step(self, batch: Batch) -> None:
        if self.workspace is not None and batch.has_decode:
            self.workspace.update(self.table, batch)

    def end_step(self, batch: Batch) -> None:
        """Move live tokens together, so that pages become free."""
        compact(self.pages, self.table, batch)

    def lower_ends(self, batch: Batch, row: int, ends: torch.Tensor) -> None:
        lower_ends(self.pages, self.table, batch, row, ends)


@dataclass
class SubsetFormula(Formula[SubsetState]):
    """Attention of a layer with H heads of size d and interaction keys of size r. The layer is one stream.

    Attributes:
        scale: factor of the logits.
        bias: [1] bias of the interaction scores.
    """

    scale: float
    bias: torch.Tensor

    def forward(self, inputs: Sequence[torch.Tensor], batch: Batch, state: SubsetState, out: torch.Tensor) -> None:
        """Write T new tokens into their pages, find what they drop, and compute attention over the rest.

        Args:
            inputs: q, k and v [T, H * d], interaction queries and keys [T, r].
            out: [T, H * d]; the output is written here.
        """
        pages, table, layer = state.pages, state.table, self.layer
        *qkv, int_q, int_k = inputs
        heads, dim = pages.k.shape[2:]
        k, v = (x.unflatten(1, (1, heads, dim)) for x in qkv[1:])
        q, out = (x.unflatten(1, (1, heads, 1, dim)) for x in (qkv[0], out))
        subset_write(pages, table, batch, layer, k=k, v=v, int_k=int_k[:, None])
        drop_times(pages, table, batch, layer, int_q[:, None], self.bias, state.ends)
        attention.subset_attention(pages, table, batch, layer, q, self.scale, out, state.workspace)
