"""The KV-cache manager through which vLLM sees the page pool: it counts slabs and hands out pages.

vLLM's scheduler asks for blocks and reads its gauges from the BlockPool. A block here is only a unit of account,
one page for every stream ("slab"): the manager holds as many blocks as its pages in use fill, and returns one as
soon as one fewer is enough. The manager has page ids of its own, so a block's number means nothing, and pages
scattered by release cannot keep blocks from being returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from .admission import LiveShare
from .geometry import PageGeometry
from .messages import PageReport, TableUpdate
from .pool import NO_NUMBERS, PagePool
from .spec import StreamPageSpec

REPORT_EVERY = 4
"""Decode steps whose live ranges are reported together, because a report's cost hardly depends on its size."""
FEW_REQUESTS = 16
"""Running requests from which on decode steps report together. With fewer requests every step reports."""


class StreamPageManager(SingleTypeKVCacheManager):
    """Allocates pages for scheduled tokens and takes back the pages that the workers report dead.

    A request's row in vLLM's own block table has a single entry, the request's slot.
    """

    kv_cache_spec: StreamPageSpec

    def __init__(self, kv_cache_spec: StreamPageSpec, block_pool: BlockPool, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, block_pool, **kwargs)
        spec = kv_cache_spec
        geometry = PageGeometry.of(spec, block_pool.num_gpu_blocks)
        self.pool = PagePool(
            num_blocks=block_pool.num_gpu_blocks,
            streams=geometry.streams,
            num_slots=geometry.num_slots,
            num_chunks=geometry.num_chunks,
            max_chunks=geometry.max_chunks,
        )
        self.live_share = LiveShare()
        self._chunk_pages = cdiv(spec.max_step_tokens, self.block_size) + 1
        self._held_blocks: list[KVCacheBlock] = []
        self._slot_of: dict[str, int] = {}
        # Tokens that fit into a request's pages: most calls of a decode step end at this look-up.
        self._room: dict[str, int] = {}
        # Tokens of a request after the step that is being scheduled.
        self._length: dict[str, int] = {}
        # Pages per stream for which a request was admitted; the entry is removed once its prompt has them all.
        self._prompt_pages: dict[str, int] = {}
        self._opened: list[int] = []
        self._step = 0
        # Slots whose live ranges may have moved since they were last reported.
        self._due: dict[int, None] = {}
        # Columns allocated in steps that no report has come back from: (step, slot, count). Steps with prompts
        # always report, because many dead pages may be expected from them.
        self._unreported: list[tuple[int, int, int]] = []

    # What vLLM's scheduler calls.

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Return the blocks needed for ``num_tokens``; with ``apply_admission_cap``, those to be free to admit."""
        room = self._room.get(request_id, 0)
        if num_tokens <= room and not apply_admission_cap:
            return 0
        pages = cdiv(num_tokens, self.block_size)
        if apply_admission_cap:
            self._prompt_pages[request_id] = pages
            return self._pages_to_admit(request_id, pages)
        slot = self._slot_of.get(request_id, 0)
        missing = pages - room // self.block_size
        if not (slot or self.pool.has_free_slot) or not self.pool.chunks_available(slot, missing):
            # No slot or no page-table chunk is free. The answer is more than the pool has, so the request waits.
            return self.block_pool.num_gpu_blocks
        return missing

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        self._length[request_id] = num_tokens
        room = self._room.get(request_id, 0)
        if num_tokens <= room:
            return []
        slot = self._slot_of.get(request_id, 0)
        missing = cdiv(num_tokens, self.block_size) - room // self.block_size
        new_row: list[KVCacheBlock] = []
        if not slot:
            slot = self._slot_of[request_id] = self.pool.open()
            self._opened.append(slot)
            new_row = self.req_to_blocks[request_id] = [KVCacheBlock(block_id=slot)]
        self.pool.reserve(slot, missing)
        self._room[request_id] = room = room + missing * self.block_size
        self._unreported.append((self._step, slot, missing))
        if room >= self._prompt_pages.get(request_id, 0) * self.block_size:
            self._prompt_pages.pop(request_id, None)
        self._settle()
        return new_row

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take back the request's pages at once: the device runs later steps after those in flight."""
        self.req_to_blocks.pop(request_id, None)
        self._prompt_pages.pop(request_id, None)
        self._room.pop(request_id, None)
        self._length.pop(request_id, None)
        slot = self._slot_of.pop(request_id, 0)
        if slot:
            if slot in self._opened:
                self._opened.remove(slot)
            self._unreported = [entry for entry in self._unreported if entry[1] != slot]
            self._due.pop(slot, None)
            self.pool.close(slot)
            self._settle()
        return []

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        # Prefix caching is switched off at start-up.
        return tuple([] for _ in kv_cache_group_ids), 0

    # What the plugin's connector calls.

    def take_update(self, scheduled: Mapping[str, int]) -> TableUpdate:
        """Return the changes of the page table since the last step, and whose live ranges this step reports.

        Args:
            scheduled: number of new tokens of each request.
        """
        period, prompts = self.kv_cache_spec.report_period, False
        for request_id, new in scheduled.items():
            if new > 1 or self._length[request_id] % period == 0:
                self._due[self._slot_of[request_id]] = None
                prompts |= new > 1
        slots = NO_NUMBERS
        if prompts or self._reports_now():
            slots = np.fromiter(self._due, dtype=np.int64, count=len(self._due))
            self._due.clear()
        opened = np.array(self._opened, dtype=np.int64) if self._opened else NO_NUMBERS
        update = TableUpdate(self._step, slots, self.pool.epoch[slots], opened, self.pool.hand_out())
        self._opened.clear()
        self._step += 1
        return update

    def free_dead(self, report: PageReport) -> None:
        """Free the pages that the workers proved dead in a step, and learn from their number."""
        self._unreported = [entry for entry in self._unreported if entry[0] > report.step]
        if not self.kv_cache_spec.release or not report.slots.size:
            return
        freed = sum(
            self.pool.release(rank, report.slots, report.epochs, starts) for rank, starts in report.starts.items()
        )
        if freed:
            slots = report.slots[self.pool.epoch[report.slots] == report.epochs]
            pages = self.pool.num_pages[slots]
            self.live_share.observe(pages, self.pool.live_blocks(slots) / pages)
            self._settle()

    @property
    def expects_release(self) -> bool:
        """Whether reports still under way will probably free a block or more."""
        if not self.kv_cache_spec.release:
            return False
        return any(
            count * (1.0 - self.live_share.share(int(self.pool.num_pages[slot]) + self.pool.reserved(slot))) >= 1.0
            for _, slot, count in self._unreported
        )

    # Internal helpers.

    def _reports_now(self) -> bool:
        """Return whether a step without prompts reports. It does whenever few blocks are free."""
        running = len(self._slot_of)
        if running < FEW_REQUESTS or self._step % REPORT_EVERY == 0:
            return True
        return self.block_pool.get_num_free_blocks() < running

    def _pages_to_admit(self, request_id: str, pages: int) -> int:
        """Return the pages per stream that must be free before a request of ``pages`` is admitted.

        These are its own expected peak, what prompts under way have still to take, and a page for every running
        request, which will cross a page boundary sooner or later. Without release no page comes back early, so
        vLLM's own rule applies: the whole prompt must fit.
        """
        if not self.kv_cache_spec.release:
            return pages
        need = self.live_share.peak(pages, self._chunk_pages)
        for other, target in self._prompt_pages.items():
            slot = self._slot_of.get(other, 0)
            if slot and other != request_id:
                held = int(self.pool.live_blocks(slot)) + self.pool.reserved(slot)
                need += max(0, self.live_share.peak(target, self._chunk_pages) - held)
        # A request that runs alone is always admitted: start-up has checked that its peak fits.
        return need + len(self._slot_of)

    def _settle(self) -> None:
        """Take or return blocks of vLLM's pool until as many are held as the pages in use fill."""
        change = self.pool.used_blocks - len(self._held_blocks)
        if change > 0:
            self._held_blocks += self.block_pool.get_new_blocks(change)
        elif change < 0:
            self.block_pool.free_blocks(self._held_blocks[change:])
            del self._held_blocks[change:]
