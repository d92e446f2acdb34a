"""One layer's attention with Dynamic Context Pruning in one step: the leaf functions in order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_fox.kernels.compaction import compact
from vllm_fox.kernels.drop_times import drop_times
from vllm_fox.kernels.paged import Batch, PageTable
from vllm_fox.kernels.subset import NEVER, SubsetPages
from vllm_fox.kernels.subset_attention import make_room, subset_attention
from vllm_fox.kernels.subset_write import subset_write


class SubsetState:
    """What the layers of one worker share from step to step.

    Args:
        table: the worker's page table.
        pages: the page pool.
        num_layers: of the worker.
        max_rows: most rows that a step can have.
        max_model_len: longest request.
        propagate: whether what a layer drops is dropped in all layers above it.
    """

    def __init__(
        self,
        table: PageTable,
        pages: SubsetPages,
        num_layers: int,
        max_rows: int,
        max_model_len: int,
        propagate: bool,
    ) -> None:
        self.table, self.pages, self.num_layers = table, pages, num_layers
        shape, device = (max_rows, max_model_len), pages.end.device
        self.ends = torch.full(shape, NEVER, dtype=torch.int32, device=device) if propagate else None
        self.room = make_room(max_rows, max_model_len, device)

    def end_step(self, batch: Batch) -> None:
        """After the last layer: give pages back that are not needed."""
        compact(self.pages, self.table, batch)


@dataclass
class SubsetAttentionImpl:
    """Constants of a layer.

    Attributes:
        layer: index of the layer on this worker.
        scale: of the logits.
        bias: [1], of the interaction scores.
    """

    layer: int
    scale: float
    bias: torch.Tensor

    # vLLM's capability checks.
    supports_pcp = False
    supports_dcp = False

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        int_q: torch.Tensor,
        int_k: torch.Tensor,
        batch: Batch,
        state: SubsetState,
        out: torch.Tensor,
    ) -> None:
        """Write the new tokens, find what they drop, attend to the rest; after the last layer, compact.

        Args:
            q, k, v: [T, H, d].
            int_q, int_k: [T, r].
            out: [T, H, d], written.
        """
        pages, table, layer = state.pages, state.table, self.layer
        subset_write(pages, table, batch, layer, k, v, int_k)
        drop_times(pages, table, batch, layer, int_q, self.bias, state.ends)
        subset_attention(pages, table, batch, layer, q, self.scale, out, room=state.room)
        if layer == state.num_layers - 1:
            state.end_step(batch)
