"""Sizes of the page table, which the scheduler and the workers derive from the spec in the same way."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.utils.math_utils import cdiv

from vllm_fox.kernels.paged import TABLE_CHUNK

from .spec import StreamPageSpec

TABLE_SHARE = 0.01
"""The page table takes at most this share of the KV memory."""


@dataclass(frozen=True)
class PageGeometry:
    """Sizes of the page table, derived the same way by the scheduler and by every worker.

    Attributes:
        streams: number of streams of each rank.
        num_slots: requests that may run at once; slot 0, which is padding, is not counted.
        max_chunks: table chunks that the longest request needs.
        num_chunks: table chunks, the padding chunk included.
    """

    streams: tuple[int, ...]
    num_slots: int
    max_chunks: int
    num_chunks: int

    @classmethod
    def of(cls, spec: StreamPageSpec, num_blocks: int) -> PageGeometry:
        """Return the geometry for a pool of ``num_blocks`` slabs. Block 0, vLLM's null block, is padding."""
        max_chunks = cdiv(cdiv(spec.max_model_len, spec.block_size), TABLE_CHUNK)

        def affordable(streams: int) -> int:
            # Besides the entries, two small arrays (chunk numbers and live ranges) grow with the number of slots.
            budget = num_blocks * streams * spec.page_format.page_bytes * TABLE_SHARE
            budget -= 4 * (spec.num_slots + 1) * (max_chunks + streams)
            return int(budget // (4 * streams * TABLE_CHUNK))

        # The table always fits one request of full length: it takes far less memory than the request's pages.
        most = max(min(map(affordable, spec.streams)) - 1, max_chunks)
        return cls(spec.streams, spec.num_slots, max_chunks, 1 + min(spec.num_slots * max_chunks, most))

    def table_bytes(self, rank: int) -> int:
        """Return the device memory in bytes of the page table on a rank."""
        slots, streams = self.num_slots + 1, self.streams[rank]
        return 4 * (slots * (self.max_chunks + streams) + self.num_chunks * streams * TABLE_CHUNK)
