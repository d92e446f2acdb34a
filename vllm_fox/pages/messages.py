"""The messages that the scheduler and the workers exchange in every step, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from .pool import Columns


@dataclass
class TableUpdate(KVConnectorMetadata):
    """Message to the workers: changes of the page table, and whose live ranges the step reports.

    Attributes:
        step: number of the scheduling step.
        slots, epochs: [R] slots of the requests whose live ranges this step reports, and their epochs.
        opened: [o] slots given to new (or resumed) requests.
        first: [o, streams of all ranks] their first live pages: 0, unless they begin with a cached prefix.
        columns: pages handed out for the step.
        boundary_slots, boundary_pages: [B] the step also reports the live ranges as they are after so many pages of
            these slots' requests, which it fills.
        freed: for each rank, pages that were freed since the last step, and may have been handed out again for this
            one; None unless free pages are poisoned.
    """

    step: int
    slots: np.ndarray
    epochs: np.ndarray
    opened: np.ndarray
    first: np.ndarray
    columns: Columns
    boundary_slots: np.ndarray
    boundary_pages: np.ndarray
    freed: list[np.ndarray] | None = None

    def __repr__(self) -> str:
        """Return a short text: vLLM prints it when a step fails, and the arrays may hold a million ids."""
        return f"TableUpdate(step={self.step}, rows={len(self.slots)}, page columns={len(self.columns.ids)})"


class PageReport(KVConnectorWorkerMetadata):
    """Message to the scheduler: the first live page of every stream of the requests that a step reports.

    On a GPU the numbers are still being copied when the worker makes the report. They are read when the report is
    pickled or ``starts`` is first used. vLLM does that after it has waited for the step's tokens, so it waits once.

    Attributes:
        step, slots, epochs: as in the step's :class:`TableUpdate`.
        starts: maps a rank to the first live pages [R + B, streams] int32: of the slots, then of the boundaries.
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
