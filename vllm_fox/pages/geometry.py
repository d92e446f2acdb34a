"""Sizes of the page table, which scheduler and workers derive alike from the spec."""

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
        streams: of each rank.
    """

    streams: tuple[int, ...]
    num_slots: int
    max_chunks: int
    num_chunks: int

    @classmethod
    def of(cls, spec: StreamPageSpec, num_blocks: int) -> PageGeometry:
        """Geometry for a pool of ``num_blocks`` slabs; block 0, vLLM's null block, is padding."""
        max_chunks = cdiv(cdiv(spec.max_model_len, spec.block_size), TABLE_CHUNK)

        def affordable(streams: int) -> int:
            # Entries, plus the two small arrays (chunk numbers and live ranges) that grow with the slots.
            budget = num_blocks * streams * spec.page_format.page_bytes * TABLE_SHARE
            budget -= 4 * (spec.num_slots + 1) * (max_chunks + streams)
            return int(budget // (4 * streams * TABLE_CHUNK))

        # At least one request of full length: it needs far less table than its pages take.
        most = max(min(map(affordable, spec.streams)) - 1, max_chunks)
        return cls(spec.streams, spec.num_slots, max_chunks, 1 + min(spec.num_slots * max_chunks, most))

    def table_bytes(self, rank: int) -> int:
        """Device memory of the page table on a rank."""
        slots, streams = self.num_slots + 1, self.streams[rank]
        return 4 * (slots * (self.max_chunks + streams) + self.num_chunks * streams * TABLE_CHUNK)
