"""Windowed attention of one layer in one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_fox.attention.step import Formula, WorkerState
from vllm_fox.kernels.paged import Batch, PageTable


class WindowedState(WorkerState):
    """What the layers of one worker share from step to step.

    Args:
        table: the worker's page table.
        k, v: [P, page_size, d] the page pool.
        windows: [streams] tokens that a query of each stream sees, of all layers.
    """

    def __init__(self, table: PageTable, k: torch.Tensor, v: torch.Tensor, windows: torch.Tensor) -> None:
        super().__init__(table)
        self.k, self.v, self.windows = k, v, windows

    def end_step(self, batch: Batch) -> None:
        """The next query of a request of n tokens stands at n and sees the keys from n + 1 - window on."""
        slots = batch.slots.long()
        oldest = (batch.seq_lens[:, None] + 1 - self.windows).clamp(min=0)
        first = torch.maximum(self.table.first_live[slots], (oldest // self.k.shape[1]).int())
        self.table.first_live[slots] = first


@dataclass
class WindowedFormula(Formula[WindowedState]):
    """Constants of a layer with H heads.

    Attributes:
        scale: of the logits.
        windows: [H].
    """

    scale: float
    windows: list[int]

    def forward(
        self, inputs: Sequence[torch.Tensor], batch: Batch, state: WindowedState, out: torch.Tensor
    ) -> None:
        """softmax over ``i - window < j <= i`` of ``scale * q_i . k_j``, times v.

        Args:
            inputs: q, k and v [T, H * d].
            out: [T, H * d], written.
        """
        heads, (_, size, dim) = len(self.windows), state.k.shape
        q, k, v, result = (x.unflatten(1, (heads, dim)) for x in (*inputs, out))
        start = 0
        for slot, length, new in zip(batch.slots, batch.seq_lens.tolist(), batch.query_lens_host):
            tokens, query = slice(start, start + new), torch.arange(length - new, length)
            start += new
            for head, window in enumerate(self.windows):
                stream = torch.tensor(self.layer * heads + head)
                ids = state.table.page_ids(slot.long(), query // size, stream)
                state.k[ids, query % size], state.v[ids, query % size] = k[tokens, head], v[tokens, head]
                # Pages before the first live one may belong to others by now.
                key = torch.arange(int(state.table.first_live[slot, stream]) * size, length)
                ids = state.table.page_ids(slot.long(), key // size, stream)
                logits = self.scale * q[tokens, head] @ state.k[ids, key % size].T
                seen = (key <= query[:, None]) & (key > query[:, None] - window)
                weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
                result[tokens, head] = weights @ state.v[ids, key % size]
