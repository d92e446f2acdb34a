"""What scheduler and workers tell each other in every step, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from .pool import NOTHING, Columns


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else NOTHING


@dataclass
class TableUpdate(KVConnectorMetadata):
    """Scheduler to workers: changes of the page table, and whose live ranges the step looks at.

    Attributes:
        step: number of the scheduling step.
        slots, epochs: [R] slots of requests whose live ranges this step looks at, with their incarnation.
        opened: [o] slots given to new (or resumed) requests; their live range starts at page 0.
        chunk_slot, chunk_index, chunk_id: [c] table chunks given to slots.
        column_chunk, column_offset: [n] where in the table the new page indices stand.
        ids: [n, streams of all ranks] their page ids.
    """

    step: int
    slots: np.ndarray
    epochs: np.ndarray
    opened: np.ndarray
    chunk_slot: np.ndarray
    chunk_index: np.ndarray
    chunk_id: np.ndarray
    column_chunk: np.ndarray
    column_offset: np.ndarray
    ids: np.ndarray

    def __repr__(self) -> str:
        """Short: vLLM prints it when a step fails, and the arrays may hold a million ids."""
        return f"TableUpdate(step={self.step}, rows={len(self.slots)}, page columns={len(self.ids)})"

    @classmethod
    def of(
        cls,
        step: int,
        slots: np.ndarray,
        epochs: np.ndarray,
        opened: Sequence[int],
        columns: Sequence[Columns],
    ) -> TableUpdate:
        grown = [c for c in columns if len(c.new_chunk)]
        return cls(
            step=step,
            slots=slots,
            epochs=epochs,
            opened=np.array(opened, dtype=np.int64) if opened else NOTHING,
            chunk_slot=_join([np.full(len(c.new_chunk), c.slot) for c in grown]),
            chunk_index=_join([c.new_chunk_index for c in grown]),
            chunk_id=_join([c.new_chunk for c in grown]),
            column_chunk=_join([c.chunk for c in columns]),
            column_offset=_join([c.offset for c in columns]),
            ids=_join([c.ids for c in columns]) if columns else NOTHING[:, None],
        )


class PageReport(KVConnectorWorkerMetadata):
    """Workers to scheduler: first live page of every stream of the requests that a step looked at.

    On a GPU the numbers are still being copied when the worker makes the report. They are read when the report is
    pickled or first looked at, which vLLM does after it has waited for the step's tokens, so nobody waits twice.

    Attributes:
        step, slots, epochs: as in the step's :class:`TableUpdate`.
        starts: rank -> [R, streams] int32.
    """

    def __init__(
        self,
        step: int,
        slots: np.ndarray,
        epochs: np.ndarray,
        rank: int,
        starts: torch.Tensor,
        ready: torch.cuda.Event | None,
    ) -> None:
        self.step, self.slots, self.epochs = step, slots, epochs
        self._starts: dict[int, torch.Tensor | np.ndarray] = {rank: starts}
        self._ready = [ready] if ready is not None else []

    @property
    def starts(self) -> dict[int, np.ndarray]:
        for event in self._ready:
            event.synchronize()
        self._ready = []
        self._starts = {rank: np.asarray(starts) for rank, starts in self._starts.items()}
        return self._starts  # type: ignore[return-value]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> PageReport:
        assert isinstance(other, PageReport) and other.step == self.step, "ranks report different steps"
        self._starts |= other._starts
        self._ready += other._ready
        return self

    def __getstate__(self) -> dict[str, Any]:
        starts = self.starts
        return {
            "step": self.step,
            "slots": self.slots,
            "epochs": self.epochs,
            "_starts": starts,
            "_ready": [],
        }
