"""Sizes of the page table, which the scheduler and the workers derive from the spec in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_fox.kernels.paged import TABLE_CHUNK

if TYPE_CHECKING:
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
        return cls.sized(
            spec.streams,
            spec.page_format.page_bytes,
            spec.block_size,
            spec.num_slots,
            spec.max_model_len,
            num_blocks,
        )

    @classmethod
    def sized(
        cls,
        streams: Sequence[int],
        page_bytes: int,
        page_size: int,
        num_slots: int,
        max_model_len: int,
        num_blocks: int,
    ) -> PageGeometry:
        """Return the geometry, given sizes.

        Args:
            streams: number of streams of each rank.
            page_bytes, page_size: bytes and tokens of a page.
            num_slots: requests that may run at once.
            max_model_len: most tokens of a request.
            num_blocks: pages of each stream, those of the null block included.
        """
        max_chunks = chunks_of(max_model_len, page_size)

        def affordable(count: int) -> int:
            # Besides the entries, two small arrays (chunk numbers and live ranges) grow with the number of slots.
            budget = num_blocks * count * page_bytes * TABLE_SHARE
            budget -= 4 * (num_slots + 1) * (max_chunks + count)
            return int(budget // (4 * count * TABLE_CHUNK))

        # The table always fits one request of full length: it takes far less memory than the request's pages.
        most = max(min(map(affordable, streams)) - 1, max_chunks)
        return cls(tuple(streams), num_slots, max_chunks, 1 + min(num_slots * max_chunks, most))

    def table_bytes(self, rank: int) -> int:
        """Return the device memory in bytes of the page table on a rank."""
        slots, streams = self.num_slots + 1, self.streams[rank]
        return 4 * (slots * (self.max_chunks + streams) + self.num_chunks * streams * TABLE_CHUNK)


def host_blocks(spec: StreamPageSpec, gib: float) -> int:
    """Return how many pages of each stream of all ranks fit into so many GiB of host memory.

    Raises:
        ValueError: not even one does, though ``gib`` is not 0. The message names the setting.
    """
    block = spec.page_format.page_bytes * sum(spec.streams)
    blocks = int(gib * 2**30) // block
    if gib and not blocks:
        raise ValueError(
            f"fox.host_cache_gib is {gib:g}: a page of each of the model's {sum(spec.streams)} streams takes "
            f"{block / 2**30:.3g} GiB, and a cache needs room for many. Set at least {64 * block / 2**30:.2g}."
        )
    return blocks


def chunks_of(tokens: int, page_size: int) -> int:
    """Return the table chunks that a request of so many tokens needs if all its pages live."""
    pages = -(-tokens // page_size)
    return -(-pages // TABLE_CHUNK)
