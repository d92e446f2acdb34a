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
        # Of the requests whose live ranges the applied step looks at.
        self._slots = torch.empty(0, dtype=torch.int32, device=device)

    def _to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Arrays of integers as int32 on the device, by one copy: pinned memory is asked for once, not for each."""
        sizes = [array.size for array in arrays]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self.device.type != "cpu")
        np.concatenate([array.ravel() for array in arrays], out=host.numpy(), casting="same_kind")
        parts = host.to(self.device, non_blocking=True).split(sizes)
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def apply(self, update: TableUpdate) -> None:
        """Write a step's changes, before its forward pass."""
        slots, opened, chunk_slot, chunk_index, chunk_id, column_chunk, column_offset, ids = self._to_device(
            update.slots,
            update.opened,
            update.chunk_slot,
            update.chunk_index,
            update.chunk_id,
            update.column_chunk,
            update.column_offset,
            update.ids[:, self._columns],
        )
        self._slots = slots
        if opened.numel():
            # Not by assignment: PyTorch would copy the 0 from the host and wait for the step under way.
            self.table.first_live.index_fill_(0, opened.long(), 0)
        if chunk_slot.numel():
            self.table.chunk_of[chunk_slot, chunk_index] = chunk_id
        if column_chunk.numel():
            self.table.entries.transpose(1, 2)[column_chunk, column_offset] = ids

    def report(self, update: TableUpdate) -> PageReport:
        """First live pages of the applied update's slots, after its step; the copy is asynchronous on a GPU."""
        starts = self.table.first_live[self._slots]
        ready = None
        if starts.is_cuda and starts.numel():
            host = torch.empty(starts.shape, dtype=starts.dtype, pin_memory=True)
            starts = host.copy_(starts, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return PageReport(update.step, update.slots, update.epochs, self.rank, starts.cpu(), ready)
