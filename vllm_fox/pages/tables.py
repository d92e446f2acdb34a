"""The worker's page table on the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from vllm_fox.kernels.paged import TABLE_CHUNK, PageTable
from vllm_fox.kernels.table_update import table_update

from .geometry import PageGeometry
from .messages import NO_FETCHES, Fetches, PageReport, TableUpdate

FirstLiveAt = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""See :meth:`vllm_fox.attention.step.WorkerState.first_live_at`."""


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
        # Slots of the requests whose live ranges the applied step reports, boundaries (slots and pages) whose live
        # ranges it reports too, and the live ranges of their slots before the step.
        self._slots = self._boundary_slots = self._boundary_pages = torch.empty(0, dtype=torch.int32, device=device)
        self._before = torch.empty(0, streams, dtype=torch.int32, device=device)
        self._nothing = torch.empty(0, streams, dtype=torch.int32)
        # Compile the kernel now, on slot 0, which is padding: nothing is compiled while serving.
        one = zeros(1)
        table_update(
            self.table,
            opened=one,
            first=zeros(streams),
            chunk_slot=one,
            chunk_index=one,
            chunk_id=one,
            column_chunk=one,
            column_offset=one,
            ids=zeros(streams),
        )

    def write(self, update: TableUpdate) -> None:
        """Write a step's changes before its forward pass, with one copy to the device and one kernel launch."""
        new = update.columns
        changes = {
            "opened": update.opened,
            "first": update.first[:, self._columns].ravel(),
            "chunk_slot": new.new_chunk_slot,
            "chunk_index": new.new_chunk_index,
            "chunk_id": new.new_chunk,
            "column_chunk": new.chunk,
            "column_offset": new.offset,
            "ids": new.ids[:, self._columns].ravel(),
        }
        arrays = [update.slots, update.boundary_slots, update.boundary_pages, *changes.values()]
        sizes = [array.size for array in arrays]
        if not any(sizes):  # this is so in most steps of few requests
            return
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self.device.type != "cpu")
        np.concatenate(arrays, out=host.numpy(), casting="same_kind")
        self._slots, self._boundary_slots, self._boundary_pages, *parts = host.to(
            self.device, non_blocking=True
        ).split(sizes)
        table_update(self.table, **dict(zip(changes, parts, strict=True)))
        if update.boundary_slots.size:
            self._before = self.table.first_live.index_select(0, self._boundary_slots)

    def report(self, update: TableUpdate, first_live_at: FirstLiveAt, fetches: Fetches = NO_FETCHES) -> PageReport:
        """Report the first live pages of the update's slots after its step, and of its boundaries.

        On a GPU the copy is asynchronous. How far copies from host memory have come is reported along.
        """
        starts, ready = self._nothing, None
        if update.slots.size:
            starts = self.table.first_live.index_select(0, self._slots)
        if update.boundary_slots.size:
            at = first_live_at(self._boundary_slots, self._boundary_pages, self._before)
            # What is reported dead may belong to another request soon, so no later step may read it. A request with
            # drafts has live ranges that lag behind its boundaries.
            rows = self._boundary_slots.long()[:, None].expand_as(at)
            self.table.first_live.scatter_reduce_(0, rows, at, "amax")
            starts = torch.cat([starts, at]) if update.slots.size else at
        if starts.is_cuda:
            host = torch.empty(starts.shape, dtype=starts.dtype, pin_memory=True)
            starts = host.copy_(starts, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        return PageReport(update.step, update.slots, update.epochs, self.rank, starts, ready, fetches)
