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

from .host_tier import Copies
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
        saved, fetched: pages to copy to and from host memory before the step; None if there are none.
        last_fetch: number of the last fetch that was begun, of which ``fetched`` is a part.
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
    saved: Copies | None = None
    fetched: Copies | None = None
    last_fetch: int = 0

    def __repr__(self) -> str:
        """Return a short text: vLLM prints it when a step fails, and the arrays may hold a million ids."""
        return f"TableUpdate(step={self.step}, rows={len(self.slots)}, page columns={len(self.columns.ids)})"


@dataclass(frozen=True)
class Fetches:
    """How far a rank has come with copies from host memory, which end in the order in which they were begun.

    Attributes:
        done: number of the last fetch that is known to have ended.
        under_way: numbers of later ones, each with the event that ends it.
    """

    done: int = 0
    under_way: tuple[tuple[int, torch.cuda.Event], ...] = ()

    def last(self) -> int:
        """Return the number of the last fetch that has ended by now."""
        done = self.done
        for number, event in self.under_way:
            if not event.query():
                break
            done = number
        return done


NO_FETCHES = Fetches()


class PageReport(KVConnectorWorkerMetadata):
    """Message to the scheduler: the first live page of every stream of the requests that a step reports.

    On a GPU the numbers are still being copied when the worker makes the report. They are read when the report is
    pickled or ``starts`` is first used. vLLM does that after it has waited for the step's tokens, so it waits once.

    Attributes:
        step, slots, epochs: as in the step's :class:`TableUpdate`.
        starts: maps a rank to the first live pages [R + B, streams] int32: of the slots, then of the boundaries.
        fetched: number of the last fetch whose pages have arrived on all ranks, as seen when it is asked for.
    """

    def __init__(
        self,
        step: int,
        slots: np.ndarray,
        epochs: np.ndarray,
        rank: int,
        starts: torch.Tensor,
        ready: torch.cuda.Event | None,
        fetches: Fetches = NO_FETCHES,
    ) -> None:
        self.step, self.slots, self.epochs = step, slots, epochs
        self._starts: dict[int, torch.Tensor | np.ndarray] = {rank: starts}
        self._ready = [ready] if ready is not None else []
        self._fetches = [fetches]

    @property
    def starts(self) -> dict[int, np.ndarray]:
        for event in self._ready:
            event.synchronize()
        self._ready = []
        self._starts = {rank: np.asarray(starts) for rank, starts in self._starts.items()}
        return self._starts  # type: ignore[return-value]

    @property
    def fetched(self) -> int:
        return min(fetches.last() for fetches in self._fetches)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> PageReport:
        assert isinstance(other, PageReport) and other.step == self.step, "ranks report different steps"
        self._starts |= other._starts
        self._ready += other._ready
        self._fetches += other._fetches
        return self

    def __getstate__(self) -> dict[str, Any]:
        starts = self.starts
        return {
            "step": self.step,
            "slots": self.slots,
            "epochs": self.epochs,
            "_starts": starts,
            "_ready": [],
            "_fetches": [Fetches(self.fetched)],
        }
