"""The worker's page table on the device."""

from __future__ import annotations

import numpy as np
import torch

from vllm_fox.kernels.paged import TABLE_CHUNK, PageTable

from .messages import PageReport, TableUpdate
from .spec import PageGeometry


class DeviceTables:
    """Page table and live ranges of all slots of one rank, kept on the device from step to step.

    Every change is enqueued on the compute stream before the step that needs it, hence after all earlier steps have
    read what it overwrites.
    """

    def __init__(self, geometry: PageGeometry, rank: int, device: torch.device) -> None:
        slots, streams = geometry.num_slots + 1, geometry.streams[rank]
        self.rank, self.device = rank, device
        first = sum(geometry.streams[:rank])
        self._columns = slice(first, first + streams)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.table = PageTable(
            chunk_of=zeros(slots, geometry.max_chunks),
            entries=zeros(geometry.num_chunks, streams, TABLE_CHUNK),
            first_live=zeros(slots, streams),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return host
        return host.pin_memory().to(self.device, non_blocking=True)

    def apply(self, update: TableUpdate) -> None:
        """Write a step's changes, before its forward pass."""
        if update.opened.size:
            # Not by assignment: PyTorch would copy the 0 from the host and wait for the step under way.
            self.table.first_live.index_fill_(0, self._to_device(update.opened), 0)
        if update.chunk_slot.size:
            where = (self._to_device(update.chunk_slot), self._to_device(update.chunk_index).long())
            self.table.chunk_of[where] = self._to_device(update.chunk_id)
        if update.column_chunk.size:
            by_column = self.table.entries.transpose(1, 2)
            where = (
                self._to_device(update.column_chunk).long(),
                self._to_device(update.column_offset).long(),
            )
            by_column[where] = self._to_device(update.ids[:, self._columns])

    def report(self, update: TableUpdate) -> PageReport:
        """First live pages of the step's slots, after its forward pass; the copy is asynchronous on a GPU."""
        if not update.slots.size:
            nothing = torch.empty(0, self.table.first_live.shape[1], dtype=torch.int32)
            return PageReport(update.step, update.slots, update.epochs, self.rank, nothing, None)
        starts = self.table.first_live[self._to_device(update.slots)]
        ready = None
        if starts.is_cuda:
            host = torch.empty(starts.shape, dtype=starts.dtype, pin_memory=True)
            starts = host.copy_(starts, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return PageReport(update.step, update.slots, update.epochs, self.rank, starts, ready)
