"""The KV-cache manager through which vLLM sees the page pool: it counts slabs and hands out pages.

vLLM's scheduler asks for blocks and reads its gauges from the BlockPool. A block here is only a unit of account,
one page for every stream ("slab"): the manager holds as many blocks as its pages in use fill, and returns one as
soon as one fewer is enough. The manager has page ids of its own, so a block's number means nothing, and pages
scattered by release cannot keep blocks from being returned.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from .admission import LiveShare
from .geometry import PageGeometry
from .host_tier import HostTier
from .messages import PageReport, TableUpdate
from .pool import NO_NUMBERS, PagePool
from .prefixes import Hit
from .spec import StreamPageSpec
from .work import NO_BOUNDARIES, Boundaries, Prompts, WorkCount

if TYPE_CHECKING:
    from vllm.v1.request import Request

REPORT_EVERY = 4
"""Decode steps whose live ranges are reported together, because a report's cost hardly depends on its size."""
FEW_REQUESTS = 16
"""Running requests from which on decode steps report together. With fewer requests every step reports."""

NO_DRAFTS: Mapping[str, Sequence[int]] = {}
"""No request of a step has tokens that may be rejected."""

COLUMNS_PER_BLOCK = 16
"""Columns of the prefix cache for each block. Most pages of a column are dead, so that a block holds several."""


@dataclass
class CachedPrefix(KVCacheBlock):
    """Carries a hit through vLLM's scheduler, from the look-up to the allocation."""

    hit: Hit | None = None


@dataclass(frozen=True)
class _Boundaries:
    """Where the live ranges of a step's report hold: first those of its slots, then those of its boundaries.

    Attributes:
        slots, epochs: [n] whose they are.
        columns, lives: [n] columns of the prefix cache that end there, and what tells their uses apart.
        inside: the boundaries inside of prompts, which are the last.
    """

    slots: np.ndarray
    epochs: np.ndarray
    columns: np.ndarray
    lives: np.ndarray
    inside: Boundaries


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
            cached_columns=COLUMNS_PER_BLOCK * block_pool.num_gpu_blocks if self.enable_caching else 0,
        )
        self.live_share = LiveShare()
        self.work = WorkCount(self.block_size, int(self.pool.streams.sum()))
        # Steps that were scheduled between a change of a live range and the report of it, since they were last
        # taken; steps that report, each with the step of the oldest change that it reports; and the step of the
        # oldest change that no step has reported.
        self.report_lags: list[int] = []
        self._reporting: list[tuple[int, int]] = []
        self._due_since = 0
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
        # Slots whose live ranges may have moved since they were last reported, and their full pages then.
        self._due: dict[int, int] = {}
        # Columns allocated in steps that no report has come back from: (step, slot, count). Steps with prompts
        # always report, because many dead pages may be expected from them.
        self._unreported: list[tuple[int, int, int]] = []
        # Hashes of a running request's full pages, a list that vLLM extends; how many of these are in the prefix
        # cache; how many are full after the step being scheduled, if these are more; and the hashes of what some
        # running request is about to compute.
        self._hashes: dict[str, Sequence[Hashable]] = {}
        self._shared_pages: dict[str, int] = {}
        self._full_pages: dict[str, int] = {}
        self._under_way: dict[Hashable, str] = {}
        self._boundaries: dict[int, _Boundaries] = {}
        self.host: HostTier | None = None
        # vLLM replaces this dictionary when its prefix cache is reset, and tells nobody.
        self._seen_cache = block_pool.cached_block_hash_to_block

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
        hit = _hit_of(new_computed_blocks)
        if apply_admission_cap:
            self._prompt_pages[request_id] = pages
            whole = pages
            if hit is not None:
                whole -= hit.pages
                whole += self._blocks_woken(hit, whole + len(self._slot_of))
            return self._pages_to_admit(request_id, pages, whole)
        slot = self._slot_of.get(request_id, 0)
        if hit is not None:
            missing = pages - hit.pages
            if not self.pool.has_free_slot or not self.pool.chunks_available_after(hit, missing):
                return self.block_pool.num_gpu_blocks
            return missing + self._blocks_woken(hit, missing)
        missing = pages - room // self.block_size
        if not (slot or self.pool.has_free_slot) or not self.pool.chunks_available(slot, missing):
            # No slot or no page-table chunk is free. The answer is more than the pool has, so the request waits.
            return self.block_pool.num_gpu_blocks
        return missing

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Let a request begin with the cached prefix that the look-up found for it."""
        hit = _hit_of(new_computed_blocks)
        if hit is not None:
            self._open(request_id)
            self.pool.adopt(self._slot_of[request_id], hit)
            self._room[request_id] = hit.pages * self.block_size
            self._settle()

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
            new_row = self._open(request_id)
            slot = self._slot_of[request_id]
        self.pool.reserve(slot, missing)
        self._room[request_id] = room = room + missing * self.block_size
        self._unreported.append((self._step, slot, missing))
        if room >= self._prompt_pages.get(request_id, 0) * self.block_size:
            self._prompt_pages.pop(request_id, None)
        self._settle()
        return new_row

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Note which pages are full after this step. Later requests may begin with them from the next step on."""
        request_id = request.request_id
        shared = self._shared_pages.get(request_id)
        if shared is not None and num_tokens < (shared + 1) * self.block_size:
            return  # most calls of a decode step end here
        hashes = request.block_hashes
        if shared is None:
            self._hashes[request_id] = hashes
            shared = self._shared_pages[request_id] = self.pool.offered(self._slot_of[request_id])
            # Prompts that begin alike wait for each other rather than compute the same pages twice.
            for key in hashes[shared:]:
                self._under_way.setdefault(key, request_id)
        full = min(len(hashes), num_tokens // self.block_size)
        if full > shared:
            self._full_pages[request_id] = full

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take back the request's pages at once: the device runs later steps after those in flight."""
        self.req_to_blocks.pop(request_id, None)
        self._prompt_pages.pop(request_id, None)
        self._room.pop(request_id, None)
        self._length.pop(request_id, None)
        self._full_pages.pop(request_id, None)
        hashes = self._hashes.pop(request_id, ())
        self._no_longer_under_way(request_id, hashes[self._shared_pages.pop(request_id, 0) :])
        slot = self._slot_of.pop(request_id, 0)
        if slot:
            if slot in self._opened:
                self._opened.remove(slot)
            self._unreported = [entry for entry in self._unreported if entry[1] != slot]
            self._due.pop(slot, None)
            self.pool.close(slot, hashes)
            self._settle()
        return []

    def find_longest_cache_hit(  # type: ignore[override]  # vLLM calls it on the manager
        self, block_hashes: Sequence[Hashable], max_length: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Return a handle of the longest cached prefix of at most ``max_length`` tokens, and its tokens."""
        if self.block_pool.cached_block_hash_to_block is not self._seen_cache:
            self.forget_prefixes()
        assert self.pool.prefixes is not None
        hit = self.pool.prefixes.find(block_hashes[: max_length // self.block_size])
        if hit is None:
            return ([],), 0
        return ([CachedPrefix(block_id=0, hit=hit)],), hit.pages * self.block_size

    # What the plugin's connector calls.

    def take_update(
        self, scheduled: Mapping[str, int], drafts: Mapping[str, Sequence[int]] = NO_DRAFTS
    ) -> TableUpdate:
        """Return the changes of the page table since the last step, and whose live ranges this step reports.

        Args:
            scheduled: number of new tokens of each request.
            drafts: those among them, of some requests, that may be rejected.
        """
        # What is cached needs the live ranges as they are where a page ends, and pages die no earlier.
        caching = self.enable_caching and self.kv_cache_spec.release
        period, unsettled = self.kv_cache_spec.report_period, self.kv_cache_spec.unsettled
        if not self._due:
            self._due_since = self._step
        read: list[tuple[int, int, int]] = []
        for request_id, new in scheduled.items():
            length = self._length[request_id]
            certain = new - len(drafts[request_id]) if drafts and request_id in drafts else new
            if certain > 1:
                read.append((self._slot_of[request_id], length - new, length - new + certain))
            if caching:
                continue
            settled = length - unsettled
            # So many new tokens have passed the end of a period.
            if certain > 1 or settled % period < new:
                self._due[self._slot_of[request_id]] = settled // period
        if caching and self._full_pages:
            prompts_of = {slot for slot, _, _ in read}
            full = {self._slot_of[request_id]: pages for request_id, pages in self._full_pages.items()}
            self._due |= {slot: pages for slot, pages in full.items() if slot not in prompts_of}
        slots, pages = NO_NUMBERS, NO_NUMBERS
        if read or self._reports_now():
            slots = np.fromiter(self._due, dtype=np.int64, count=len(self._due))
            pages = np.fromiter(self._due.values(), dtype=np.int64, count=len(self._due))
            self._due.clear()
        opened = np.array(self._opened, dtype=np.int64) if self._opened else NO_NUMBERS
        columns = self.pool.hand_out()
        inside = NO_BOUNDARIES
        prompts = self._prompts(read) if read else None
        self._count_work(scheduled, drafts, prompts)
        if prompts is not None and caching:
            inside = prompts.boundaries(self.block_size)
        self._share_full_pages(slots, pages, inside)
        if slots.size or inside.slots.size:
            self._reporting.append((self._step, self._due_since))
        # With drafts a step moves live ranges past the boundary that its tokens have made certain.
        past = len(slots) if caching and unsettled else 0
        update = TableUpdate(
            self._step,
            slots[past:],
            self.pool.epoch[slots[past:]],
            opened,
            self.pool.start[opened],
            columns,
            np.concatenate([slots[:past], inside.slots]),
            np.concatenate([pages[:past], inside.pages]),
        )
        if self.host is not None:
            # Last, because pages are given away until here.
            update.saved, update.fetched = self.host.take_copies()
            update.last_fetch = self.host.last_fetch
        self._opened.clear()
        self._step += 1
        return update

    def enter_fetched(self, report: PageReport) -> None:
        """Let requests begin with the pages that have arrived from host memory."""
        if self.host is not None and self.host.arrive(report.fetched):
            self._settle()

    def free_dead(self, report: PageReport) -> None:
        """Free the pages that the workers proved dead in a step, and learn from their number."""
        self._unreported = [entry for entry in self._unreported if entry[0] > report.step]
        boundaries = self._boundaries.pop(report.step, None)
        # Reports come in order; those of steps that failed never come. One that came all the same, late or again,
        # would say nothing of the prefix cache any more.
        self._boundaries = {step: left for step, left in self._boundaries.items() if step > report.step}
        while self._reporting and self._reporting[0][0] <= report.step:
            step, since = self._reporting.pop(0)
            if step == report.step:
                self.report_lags.append(self._step - 1 - since)
        if not self.kv_cache_spec.release:
            return
        slots, epochs, starts = report.slots, report.epochs, report.starts
        if boundaries is not None:
            slots, epochs, starts = self._learn_boundaries(boundaries, starts)
        else:
            starts = {rank: mine[: len(slots)] for rank, mine in starts.items()}
        if not slots.size:
            return
        freed = sum(self.pool.release(rank, slots, epochs, mine) for rank, mine in starts.items())
        if freed:
            slots = slots[self.pool.epoch[slots] == epochs]
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

    def open_host_tier(self, blocks: int) -> None:
        """Keep cached prefixes in host memory too: so many pages of each stream."""
        self.host = HostTier(self.pool, blocks, COLUMNS_PER_BLOCK * blocks + 1)

    def must_wait(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether more of a prompt will be cached soon than is now, so that the request is to ask again.

        Args:
            request: a request that waits to be admitted.
            num_computed_tokens: what is cached of it now.
        """
        if request.skip_reading_prefix_cache:
            return False
        page = num_computed_tokens // self.block_size
        usable = min(len(request.block_hashes), (request.num_tokens - 1) // self.block_size)
        if page >= usable:
            return False
        # A running request is about to compute its next page.
        if self._under_way and request.block_hashes[page] in self._under_way:
            return True
        return self.host is not None and self._comes_from_host(self.host, request, page, usable)

    def _comes_from_host(self, host: HostTier, request: Request, page: int, usable: int) -> bool:
        """Whether more than ``page`` pages of a prompt are on their way from host memory; sends for them if so."""
        found = host.find(request.block_hashes[:usable], page)
        if found is None:
            return False
        if host.is_under_way(found):
            return True
        pages, woken = cdiv(request.num_tokens, self.block_size), self._blocks_of(found.pages)
        # What could not be admitted would only push out others, and perhaps be pushed out before it can.
        need = self._pages_to_admit(request.request_id, pages, pages - found.hit.pages + woken)
        if max(need, woken) > self.block_pool.get_num_free_blocks():
            return False
        host.fetch(found)
        self._settle()
        return True

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, and its part in host memory."""
        if self.pool.prefixes is not None:
            self._seen_cache = self.block_pool.cached_block_hash_to_block
            self.pool.forget_prefixes()
            if self.host is not None:
                self.host.clear()

    # Internal helpers.

    def _open(self, request_id: str) -> list[KVCacheBlock]:
        """Give a request a slot; return its row in vLLM's block table."""
        slot = self._slot_of[request_id] = self.pool.open()
        self._opened.append(slot)
        row = self.req_to_blocks[request_id] = [KVCacheBlock(block_id=slot)]
        return row

    def _prompts(self, read: list[tuple[int, int, int]]) -> Prompts:
        """What a step reads of prompts, given the slot and the tokens before and after it of each."""
        slots, before, after = np.array(read, dtype=np.int64).T
        pages = self.pool.num_pages[slots] * self.pool.streams.sum()
        return Prompts(slots, before, after, pages - self.pool.live_pages[slots].sum(1))

    def _count_work(
        self, scheduled: Mapping[str, int], drafts: Mapping[str, Sequence[int]], prompts: Prompts | None
    ) -> None:
        """Count what a step's queries read, which have their pages."""
        pool = self.pool
        if drafts:
            reading = set() if prompts is None else set(prompts.slots.tolist())
            queries = {self._slot_of[request_id]: new for request_id, new in scheduled.items()}
            slots = [slot for slot in queries if slot not in reading]
            count = np.array([queries[slot] for slot in slots], dtype=np.int64)
            pages = int((count * pool.num_pages[slots]).sum())
            live = int((count * pool.live_pages[slots].sum(1)).sum())
        elif len(scheduled) == len(self._slot_of):
            # Sums over all slots are cheaper than a list of those that decode. Slots without requests hold nothing.
            pages, live = int(pool.num_pages.sum()), int(pool.live_pages.sum())
            if prompts is not None:
                pages -= int(pool.num_pages[prompts.slots].sum())
                live -= int(pool.live_pages[prompts.slots].sum())
        else:
            slots = [self._slot_of[request_id] for request_id, new in scheduled.items() if new == 1]
            pages, live = int(pool.num_pages[slots].sum()), int(pool.live_pages[slots].sum())
        self.work.decode(pages, live)
        if prompts is not None:
            self.work.prefill(prompts)

    def _share_full_pages(self, slots: np.ndarray, pages: np.ndarray, inside: Boundaries) -> None:
        """Put the pages that are full after this step into the prefix cache.

        Args:
            slots, pages: [R] requests whose live ranges the step reports, and the full pages at which they are so.
            inside: boundaries inside of prompts, whose live ranges it reports too.
        """
        if not self.enable_caching:
            return
        if self._full_pages:
            keys: dict[int, Sequence[Hashable]] = {}
            for request_id, full in self._full_pages.items():
                hashes = self._hashes[request_id][self._shared_pages[request_id] : full]
                keys[self._slot_of[request_id]] = hashes
                self._no_longer_under_way(request_id, hashes)
                self._shared_pages[request_id] = full
            self.pool.offer(keys)
            self._full_pages.clear()
        every, ends = np.concatenate([slots, inside.slots]), np.concatenate([pages, inside.pages])
        if self.kv_cache_spec.release and every.size:
            columns = self.pool.cached_columns(every, ends)
            assert self.pool.prefixes is not None
            lives = self.pool.prefixes.lives(columns)
            self._boundaries[self._step] = _Boundaries(every, self.pool.epoch[every], columns, lives, inside)

    def _learn_boundaries(
        self, boundaries: _Boundaries, starts: dict[int, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
        """Note the live ranges of cached prefixes; return slots, epochs and starts at each slot's last boundary."""
        assert self.pool.prefixes is not None
        every, epochs = boundaries.slots, boundaries.epochs
        first = np.concatenate([starts[rank] for rank in range(self.pool.ranks)], axis=1)
        self.pool.prefixes.tighten(boundaries.columns, boundaries.lives, first)
        self.work.learn(boundaries.inside, first[len(first) - len(boundaries.inside.slots) :].sum(1))
        last = np.append(every[1:] != every[:-1], True)
        return every[last], epochs[last], {rank: mine[last] for rank, mine in starts.items()}

    def _no_longer_under_way(self, request_id: str, hashes: Sequence[Hashable]) -> None:
        for key in hashes:
            if self._under_way.get(key) == request_id:
                del self._under_way[key]

    def _blocks_woken(self, hit: Hit, others: int) -> int:
        """Blocks that the pages of a hit fill which count as free as long as no request holds them.

        This is an upper bound, and exact unless so many are free anyway, besides the ``others`` that are needed.
        """
        assert self.pool.prefixes is not None
        most = self._blocks_of(self.pool.prefixes.size(hit))
        if others + most <= self.block_pool.get_num_free_blocks():
            return most
        return self._blocks_of(self.pool.prefixes.idle_of(hit))

    def _blocks_of(self, pages: list[int]) -> int:
        """Blocks that so many pages of each rank fill on the fullest."""
        return max(cdiv(mine, streams) for mine, streams in zip(pages, self.pool.streams.tolist()))

    def _reports_now(self) -> bool:
        """Return whether a step without prompts reports. It does whenever few blocks are free."""
        running = len(self._slot_of)
        if self.enable_caching and self.kv_cache_spec.unsettled:
            return True  # drafts move live ranges in every step, soon past the boundaries to report
        if running < FEW_REQUESTS or self._step % REPORT_EVERY == 0:
            return True
        return self.block_pool.get_num_free_blocks() < running

    def _pages_to_admit(self, request_id: str, pages: int, whole: int) -> int:
        """Return the pages per stream that must be free before a request of ``pages`` is admitted.

        If it forgets nothing, it takes ``whole`` of those that are free, with what is cached for it.

        These are its own expected peak, what prompts under way have still to take, and a page for every running
        request, which will cross a page boundary sooner or later. Without release no page comes back early, so
        vLLM's own rule applies: the whole prompt must fit.
        """
        if not self.kv_cache_spec.release:
            return whole
        need = min(whole, self.live_share.peak(pages, self._chunk_pages))
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


def _hit_of(blocks: Sequence[KVCacheBlock]) -> Hit | None:
    return blocks[0].hit if blocks and isinstance(blocks[0], CachedPrefix) else None
