"""A worker's pages in host memory, and the copies to them and back."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch

from vllm_fox.kernels.page_copy import page_copy

from .host_tier import Copies
from .messages import Fetches

STAGING_BYTES, STAGING_SHARE = 256 * 2**20, 1 / 16
"""Most device memory of each of two buffers, through which pages go out, and most of it as a share of the cache's.

When a long conversation is kept no longer, all of its pages go out in one step. Those of 4,096 tokens of a model of
24 layers with 24 heads can be hundreds of MiB.
"""

HOST_REGISTER_MAPPED = 2
"""CUDA's cudaHostRegisterMapped: kernels may read and write the memory."""


class HostPages:
    """Copies pages of one worker to host memory and back.

    On a GPU host memory is pinned, and copies over the bus run on a stream of their own, one after the other.

    * What goes out is first gathered into a buffer on the compute stream. So it is read before any later step can
      write to its page, and a step waits for the bus only if more is on its way than two buffers hold.
    * What comes back is written to pages that no step reads before it has arrived. The copy waits for what is on
      the compute stream when it is begun, since earlier steps may still read these pages for their last tenants.

    On a CPU the same copies are made at once.

    Args:
        pool: the whole cache as bytes.
        page_bytes: bytes of a page of one stream, a multiple of 16.
        num_pages: pages of host memory; they have the numbers from 1 on.

    Raises:
        RuntimeError: the host memory cannot be pinned.
    """

    def __init__(self, pool: torch.Tensor, page_bytes: int, num_pages: int) -> None:
        self._pages = _words(pool[: len(pool) // page_bytes * page_bytes], page_bytes)
        self._device = pool.device
        self._host = _words(torch.empty((1 + num_pages) * page_bytes, dtype=torch.uint8), page_bytes)
        self._fetches = Fetches()
        self._stream: torch.cuda.Stream | None = None
        self._buffers: list[_Buffer] = []
        if pool.is_cuda:
            _pin(self, self._host)
            self._stream = torch.cuda.Stream(self._device)
            # A multiple of 4, so that the ids of every part are aligned as a kernel was compiled for.
            staging = min(STAGING_BYTES, int(STAGING_SHARE * pool.nbytes))
            rows = max(4, staging // page_bytes // 4 * 4)
            self._buffers = [_Buffer(self._pages.new_empty(rows, self._pages.shape[1])) for _ in range(2)]
            self._rows = torch.arange(rows, dtype=torch.int32, device=self._device)
            # Compile the kernel now, on pages that are padding: nothing is compiled while serving.
            self._copy_out(self._rows[:1] * 0, self._rows[:1] * 0)
            self._stream.synchronize()

    def save(self, copies: Copies, rank: int) -> None:
        """Copy pages to host memory, before anything else of the step touches them."""
        ids, host = self._on_device(copies.pages[rank], copies.host[rank])
        if self._stream is None:
            page_copy(ids, host, source=self._pages, target=self._host)
        elif ids.numel():
            self._copy_out(ids, host)

    def _copy_out(self, ids: torch.Tensor, host: torch.Tensor) -> None:
        assert self._stream is not None
        compute = torch.cuda.current_stream(self._device)
        rows = len(self._rows)
        for start in range(0, len(ids), rows):
            buffer, other = self._buffers
            self._buffers = [other, buffer]
            part, places = ids[start : start + rows], host[start : start + rows]
            compute.wait_event(buffer.free)
            torch.index_select(self._pages, 0, part, out=buffer.pages[: len(part)])
            self._stream.wait_stream(compute)
            with torch.cuda.stream(self._stream):
                page_copy(self._rows[: len(part)], places, source=buffer.pages, target=self._host)
                buffer.free.record()
        host.record_stream(self._stream)

    def fetch(self, copies: Copies, rank: int, number: int) -> None:
        """Begin to copy pages from host memory.

        Args:
            copies: which pages; for this rank there may be none.
            rank: this worker's rank.
            number: number of the last fetch that they belong to.
        """
        ids, host = self._on_device(copies.pages[rank], copies.host[rank])
        if self._stream is None:
            page_copy(host, ids, source=self._host, target=self._pages)
            self._fetches = Fetches(number)
            return
        event = torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if ids.numel():
                page_copy(host, ids, source=self._host, target=self._pages)
            event.record()
        ids.record_stream(self._stream)
        host.record_stream(self._stream)
        self._fetches = Fetches(self._fetches.done, (*self._fetches.under_way, (number, event)))

    def fetches(self) -> Fetches:
        """Return how far the fetches have come, for the step's report."""
        done = self._fetches.last()
        self._fetches = Fetches(done, tuple(one for one in self._fetches.under_way if one[0] > done))
        return self._fetches

    def _on_device(self, ids: np.ndarray, host: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy two arrays [n] to the device as int32, each where a kernel finds it aligned."""
        both = torch.empty((2, -(-len(ids) // 4) * 4), dtype=torch.int32, pin_memory=self._stream is not None)
        both[0, : len(ids)], both[1, : len(ids)] = torch.from_numpy(ids), torch.from_numpy(host)
        here = both.to(self._device, non_blocking=True)
        return here[0, : len(ids)], here[1, : len(ids)]


@dataclass
class _Buffer:
    """Pages on their way out, and the event since which the buffer may be filled anew."""

    pages: torch.Tensor

    def __post_init__(self) -> None:
        self.free = torch.cuda.Event()


def _words(raw: torch.Tensor, page_bytes: int) -> torch.Tensor:
    return raw.view(torch.int32).view(-1, page_bytes // 4)


def _pin(owner: HostPages, host: torch.Tensor) -> None:
    """Pin memory for as long as its owner lives.

    PyTorch's own allocator of pinned memory would round its size up to a power of two.
    """
    cuda = torch.cuda.cudart()
    error = cuda.cudaHostRegister(host.data_ptr(), host.nbytes, HOST_REGISTER_MAPPED)
    if error.value:
        raise RuntimeError(
            f"{host.nbytes / 2**30:.1f} GiB of host memory for cached pages cannot be pinned ({error}): set "
            "fox.host_cache_gib to less."
        )
    unpin = weakref.finalize(owner, cuda.cudaHostUnregister, host.data_ptr())
    unpin.atexit = False  # the process's end does it too
