"""The scheduler's record of pages: which page ids are free, and which each running request holds.

Everything is a numpy array and every operation works on whole arrays, because a model has hundreds of streams and
a long request thousands of pages. This module does not depend on vLLM.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from vllm_fox.kernels.paged import TABLE_CHUNK

from .free_ids import FreeIds
from .prefixes import GONE, Hit, PrefixCache

Int32 = np.ndarray

MIN_PAGES_TO_SEARCH = 4
"""If a request frees at least this many pages per stream at once, whole rows of the page table are searched for
them instead of looking up each page."""

MAX_SEARCHED_PER_FREED = 16
"""Whole rows are not searched if fewer than one in this many of the entries searched would be freed."""

ROWS_AT_ONCE = 128
"""So many rows of the page table are searched together: what is worked out of them stays in the CPU's cache."""


NO_NUMBERS = np.empty(0, dtype=np.int32)


class OutOfPages(RuntimeError):
    """The pool was asked for more pages, slots or table chunks than it has free."""


@dataclass(frozen=True)
class Columns:
    """Page-table entries of the n columns that were handed out together.

    A column is one page index of one slot in all streams.

    Attributes:
        new_chunk_slot, new_chunk_index, new_chunk: [m] table chunks that slots were given: the slot, the chunk's
            index in the request, and the chunk's number.
        chunk, offset: [n] table chunk of each column, and its place in the chunk.
        ids: [n, streams of all ranks] page ids.
    """

    new_chunk_slot: Int32
    new_chunk_index: Int32
    new_chunk: Int32
    chunk: Int32
    offset: Int32
    ids: Int32


class PagePool:
    """Page ids, page table and live ranges of all running requests.

    Every rank, be it of a pipeline stage or of a tensor-parallel group, has its own page ids: pages that die on one
    rank free memory there, whatever happens on the others. Arrays hold the streams of all ranks one after the
    other; ``columns[rank]`` selects those of one rank. Slot 0, chunk 0 and the first block of each rank's pages are
    padding and never handed out.

    The requests of a step reserve pages one by one (:meth:`reserve`), which only checks that there are enough, and
    get them together (:meth:`hand_out`).

    Args:
        num_blocks: blocks of vLLM's pool, the null block included; a block is a page for every stream.
        streams: number of streams of each rank.
        num_slots: requests that may run at once.
        num_chunks: table chunks, the padding chunk included.
        max_chunks: table chunks that the longest request needs.
        cached_columns: if not 0, full pages stay for later requests that begin alike, in at most so many columns of
            a :class:`~vllm_fox.pages.prefixes.PrefixCache`. They count as free.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        streams: Sequence[int],
        num_slots: int,
        num_chunks: int,
        max_chunks: int,
        cached_columns: int = 0,
    ) -> None:
        self.streams = np.array(streams, dtype=np.int64)
        self.ranks = len(streams)
        ends = np.cumsum(streams).tolist()
        self.columns = [slice(end - count, end) for end, count in zip(ends, streams)]
        self.capacity = [(num_blocks - 1) * n for n in streams]
        self._free = [FreeIds(n, capacity) for n, capacity in zip(streams, self.capacity)]
        # Plain numbers instead of an array: there are few ranks, and a request's next page is asked for thousands
        # of times a second.
        self._per_block = list(streams)
        # Pages per stream that are reserved for each slot, their sum, and the table chunks that they will need.
        self._reserved: dict[int, int] = {}
        self._num_reserved = self._chunks_reserved = 0
        # Here the ids of a column are adjacent, as they are handed out; on the device those of a stream are.
        self._entries = np.zeros((num_chunks, TABLE_CHUNK, ends[-1]), dtype=np.int32)
        self._chunk_of = np.zeros((num_slots + 1, max_chunks), dtype=np.int32)
        self._first_chunk = np.zeros(num_slots + 1, dtype=np.int32)
        self._free_chunks = list(range(num_chunks - 1, 0, -1))
        self._free_slots = list(range(num_slots, 0, -1))
        self.start = np.zeros((num_slots + 1, ends[-1]), dtype=np.int32)
        self.num_pages = np.zeros(num_slots + 1, dtype=np.int32)
        self.live_pages = np.zeros((num_slots + 1, self.ranks), dtype=np.int64)
        self.epoch = np.zeros(num_slots + 1, dtype=np.int64)
        self.allocated_total = 0
        self.released_total = 0
        self.prefixes = PrefixCache(self.columns, cached_columns + 1) if cached_columns else None
        # The cache's column of each row of the page table, negative if some of the request's pages may be its own
        # copies; and how many of a slot's pages were offered to the cache.
        self._column_of = np.zeros((num_chunks, TABLE_CHUNK), dtype=np.int32)
        self._offered = np.zeros(num_slots + 1, dtype=np.int32)
        # What a slot's request began with: the column of the end, and the table entries that the device lacks.
        self._began_with: dict[int, int] = {}
        self._adopted: dict[int, Columns] = {}
        # Pages of each rank that were freed, for whoever asked to be told.
        self._freed: list[list[np.ndarray]] | None = None

    def _available(self) -> list[int]:
        """Pages of each rank that are free or cached."""
        if self.prefixes is None:
            return [free.left for free in self._free]
        return [free.left + idle for free, idle in zip(self._free, self.prefixes.idle)]

    @property
    def used(self) -> list[int]:
        """Pages of each rank that requests hold."""
        return [capacity - available for capacity, available in zip(self.capacity, self._available())]

    @property
    def used_total(self) -> int:
        """Pages that requests hold, summed over the ranks."""
        return sum(self.used)

    @property
    def used_blocks(self) -> int:
        """Blocks that the pages in use or reserved fill on the fullest rank."""
        # One reserved page in every stream is one block on every rank.
        return max(-(-used // streams) for used, streams in zip(self.used, self._per_block)) + self._num_reserved

    def live_blocks(self, slots: np.ndarray | int) -> np.ndarray:
        """Return the blocks [R] (or one number) that a slot's live pages fill, on the rank where they fill most."""
        return (self.live_pages[slots] / self.streams).max(-1)

    def live_by_stream(self) -> np.ndarray:
        """Return the live pages [streams of all ranks] of all slots; a page that several share counts for each."""
        live: np.ndarray = self.num_pages.sum() - self.start.sum(0)
        return live

    def reserved(self, slot: int) -> int:
        """Return the pages per stream that are reserved for ``slot``."""
        return self._reserved.get(slot, 0)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def _chunks_missing(self, slot: int, count: int) -> int:
        held = int(self.num_pages[slot]) + self.reserved(slot) if slot else 0
        return -(-(held + count) // TABLE_CHUNK) - -(-held // TABLE_CHUNK)

    def chunks_available(self, slot: int, count: int) -> bool:
        """Return whether the page table can take ``count`` more columns of ``slot`` (0 stands for a new slot)."""
        return self._chunks_missing(slot, count) + self._chunks_reserved <= len(self._free_chunks)

    def open(self) -> int:
        """Take a slot for a request, and advance its epoch, which tells the requests in a slot apart."""
        if not self._free_slots:
            raise OutOfPages("no free slot")
        slot = self._free_slots.pop()
        self.epoch[slot] += 1
        return slot

    def reserve(self, slot: int, count: int) -> None:
        """Reserve the next ``count`` pages of ``slot`` in every stream of every rank."""
        columns, chunks = self._num_reserved + count, self._chunks_reserved + self._chunks_missing(slot, count)
        enough = all(columns * streams <= free for streams, free in zip(self._per_block, self._available()))
        if not enough or chunks > len(self._free_chunks):
            raise OutOfPages(f"{count} pages in each of {self.streams.sum()} streams")
        self._num_reserved, self._chunks_reserved = columns, chunks
        self._reserved[slot] = self.reserved(slot) + count

    def hand_out(self) -> Columns:
        """Give all slots the pages that were reserved for them.

        Returns:
            These pages, and those that requests have begun with since the last call.
        """
        parts = [*self._adopted.values()]
        self._adopted.clear()
        if self._num_reserved:
            parts.append(self._hand_out_reserved())
        if len(parts) == 1:
            return parts[0]
        if not parts:
            width = self._entries.shape[2]
            return Columns(
                NO_NUMBERS, NO_NUMBERS, NO_NUMBERS, NO_NUMBERS, NO_NUMBERS, np.empty((0, width), dtype=np.int32)
            )
        return Columns(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Columns))
        )

    def _hand_out_reserved(self) -> Columns:
        total, width = self._num_reserved, self._entries.shape[2]
        self._make_room([total * streams for streams in self._per_block])
        slots = np.fromiter(self._reserved, dtype=np.int64, count=len(self._reserved))
        counts = np.fromiter(self._reserved.values(), dtype=np.int64, count=len(slots))
        first = self.num_pages[slots]
        new_chunks = (NO_NUMBERS, NO_NUMBERS, NO_NUMBERS)
        if self._chunks_reserved:
            new_chunks = self._take_chunks(slots, first, counts)
        slot, page = slots, first
        if total != len(slots):
            slot, page = np.repeat(slots, counts), np.repeat(first - np.cumsum(counts) + counts, counts)
            page += np.arange(total)
        chunk, offset = self._chunk_of[slot, page // TABLE_CHUNK], page % TABLE_CHUNK
        ids = np.empty((total, width), dtype=np.int32)
        for free, streams, columns in zip(self._free, self._per_block, self.columns):
            ids[:, columns] = free.pop(total * streams).reshape(total, -1)
        self._entries[chunk, offset] = ids
        self.num_pages[slots] += counts
        self.live_pages[slots] += counts[:, None] * self.streams
        self.allocated_total += ids.size
        self._reserved.clear()
        self._num_reserved = self._chunks_reserved = 0
        return Columns(*new_chunks, chunk, offset, ids)

    def _make_room(self, pages: Sequence[int], columns: int = 0) -> None:
        """Give cached pages away until so many of each rank are free, and so many columns of the cache."""
        if self.prefixes is None:
            return
        short = [count - free.left for count, free in zip(pages, self._free)]
        if max(short) > 0 or columns > self.prefixes.free_columns:
            self._push_all(self.prefixes.evict(short, columns))

    def _take_chunks(self, slots: np.ndarray, first: np.ndarray, counts: np.ndarray) -> tuple[Int32, Int32, Int32]:
        """Give slots the table chunks that pages ``first : first + counts`` need.

        Returns:
            Slot, index in the request, and number of each chunk.
        """
        held, needed = -(-first // TABLE_CHUNK), -(-(first + counts) // TABLE_CHUNK)
        missing = needed - held
        slot, total = np.repeat(slots, missing), int(missing.sum())
        index = np.arange(total) + np.repeat(needed - np.cumsum(missing), missing)
        chunks = np.array([self._free_chunks.pop() for _ in range(total)], dtype=np.int32)
        self._chunk_of[slot, index] = chunks
        self._column_of[chunks] = 0
        return slot, index, chunks

    # Prefix caching.

    def chunks_available_after(self, hit: Hit, count: int) -> bool:
        """Return whether the page table can take a new request's ``hit`` and ``count`` more columns."""
        chunks = -(-(hit.pages + count) // TABLE_CHUNK) - hit.low // TABLE_CHUNK
        return chunks + self._chunks_reserved <= len(self._free_chunks)

    def adopt(self, slot: int, hit: Hit) -> None:
        """Let a new request in ``slot`` begin with a cached prefix, whose pages it shares."""
        assert self.prefixes is not None
        first_chunk, last_chunk = hit.low // TABLE_CHUNK, -(-hit.pages // TABLE_CHUNK)
        if last_chunk - first_chunk + self._chunks_reserved > len(self._free_chunks):
            raise OutOfPages("table chunks")
        chunks = np.array([self._free_chunks.pop() for _ in range(first_chunk, last_chunk)], dtype=np.int32)
        self._chunk_of[slot, first_chunk:last_chunk] = chunks
        self._column_of[chunks] = 0
        self._first_chunk[slot] = first_chunk
        page = np.arange(hit.low, hit.pages)
        chunk, offset = chunks[page // TABLE_CHUNK - first_chunk], page % TABLE_CHUNK
        ids = self.prefixes.ids(hit)
        self.prefixes.hold(hit)
        self._entries[chunk, offset] = ids
        self._column_of[chunk, offset] = hit.columns
        self.start[slot] = hit.first
        self.num_pages[slot] = self._offered[slot] = hit.pages
        self.live_pages[slot] = self.prefixes.size(hit)
        self._began_with[slot] = hit.last
        index = np.arange(first_chunk, last_chunk)
        self._adopted[slot] = Columns(np.full_like(index, slot), index, chunks, chunk, offset, ids)

    def offered(self, slot: int) -> int:
        """Return how many of the slot's first pages it began with or has offered."""
        return int(self._offered[slot])

    def offer(self, keys: Mapping[int, Sequence[Hashable]]) -> None:
        """Let later requests begin with more pages of some slots, which are full once the step under way is done.

        A page must be offered before live ranges are released that later pages have led to.

        Args:
            keys: of each slot, for each page that follows those offered before, the hash of the prefix up to its
                end.
        """
        assert self.prefixes is not None
        slots = np.fromiter(keys, dtype=np.int64, count=len(keys))
        counts = np.fromiter(map(len, keys.values()), dtype=np.int64, count=len(keys))
        total = int(counts.sum())
        self._make_room([0] * self.ranks, columns=total)
        slot = np.repeat(slots, counts)
        page = np.arange(total) + np.repeat(self._offered[slots] - np.cumsum(counts) + counts, counts)
        chunk, offset = self._chunk_of[slot, page // TABLE_CHUNK], page % TABLE_CHUNK
        first = self.start[slot]
        ids = np.where(page[:, None] >= first, self._entries[chunk, offset], GONE)
        ends = [key for mine in keys.values() for key in mine]
        self._column_of[chunk, offset] = self.prefixes.add(ends, ids, first)
        self._offered[slots] += counts

    def cached_columns(self, slots: np.ndarray, pages: np.ndarray) -> np.ndarray:
        """Return the cache's columns of the last of each slot's first ``pages`` pages; 0 for those in none."""
        page = pages - 1
        columns = self._column_of[self._chunk_of[slots, page // TABLE_CHUNK], page % TABLE_CHUNK]
        return np.where(pages <= self._offered[slots], np.abs(columns), 0)

    def take_for_cache(self, pages: np.ndarray) -> np.ndarray:
        """Take a free page id for each of ``pages`` [n, W] (bool), for which there must be room.

        Returns:
            [n, W] int32 the ids, and :data:`~vllm_fox.pages.prefixes.GONE` elsewhere. They count as used until
            :meth:`put_in_cache` or :meth:`give_back`.
        """
        counts = [int(np.count_nonzero(pages[:, streams])) for streams in self.columns]
        self._make_room(counts)
        ids = np.full(pages.shape, GONE, dtype=np.int32)
        for rank, (count, streams) in enumerate(zip(counts, self.columns)):
            if count > self._free[rank].left:
                raise OutOfPages(f"{count} pages of rank {rank}")
            ids[:, streams][pages[:, streams]] = self._free[rank].pop(count)
        return ids

    def give_back(self, ids: np.ndarray) -> None:
        """Free page ids [n, W] of :meth:`take_for_cache`, except those that are GONE."""
        for rank, streams in enumerate(self.columns):
            mine = ids[:, streams]
            self._push(rank, mine[mine != GONE])

    def put_in_cache(self, keys: Sequence[Hashable], pages: int, ids: np.ndarray, first: np.ndarray) -> None:
        """Let later requests begin with pages that no request has computed here, and keep their end if it is whole.

        Pages that somebody else has entered since are freed.

        Args:
            keys: hash of the prefix up to the end of each of its last n pages.
            pages: pages of the prefix.
            ids: [n, W] of :meth:`take_for_cache`; GONE where the cache had a page already.
            first: [n, W] first live pages at their ends.
        """
        assert self.prefixes is not None
        self._make_room([0] * self.ranks, columns=len(keys))
        self.prefixes.add(keys, ids, first)
        columns = self.prefixes.columns_of(keys)
        mine = (ids != GONE) & self.prefixes.holds(columns, slice(None), ids)
        self.give_back(np.where(mine, GONE, ids))
        if columns.all():
            self.prefixes.tighten(columns, self.prefixes.lives(columns), first)
            self.prefixes.keep_end(pages, columns)
        self.leave_in_cache(columns, mine)

    def leave_in_cache(self, columns: np.ndarray, pages: np.ndarray) -> None:
        """Let go of ``pages`` [n, W] of columns that were held."""
        assert self.prefixes is not None
        for rank, streams in enumerate(self.columns):
            self.prefixes.leave_rows(rank, columns, pages[:, streams])

    def forget_prefixes(self) -> None:
        """Empty the cache. Pages that requests hold stay theirs."""
        assert self.prefixes is not None
        # What running requests hold can be found no longer: it is as if these were copies of their own.
        np.negative(np.abs(self._column_of), out=self._column_of)
        self._push_all(self.prefixes.clear())

    def release(self, rank: int, slots: np.ndarray, epochs: np.ndarray, starts: np.ndarray) -> int:
        """Free the pages that ``rank`` has proved dead. Late, repeated or outdated reports do no harm.

        Args:
            slots, epochs: [R] the slots that are reported, and the epoch of each to which the report applies.
            starts: [R, streams of the rank] first live page; pages before it are dead.

        Returns:
            Number of pages freed.
        """
        current = self.epoch[slots] == epochs
        if not current.all():
            slots, starts = slots[current], starts[current]
        columns, streams = self.columns[rank], self._per_block[rank]
        old = self.start[slots, columns]
        moved = np.flatnonzero(starts > old)
        row, stream = np.divmod(moved, streams)
        stream += columns.start
        slot = slots[row]
        low = old.ravel()[moved]  # int32
        # The newest page always lives, whatever a report says.
        high = np.minimum(starts.ravel()[moved], self.num_pages[slot] - 1)
        if (high <= low).any():
            valid = high > low
            row, stream, slot, low, high = (part[valid] for part in (row, stream, slot, low, high))
        if not row.size:
            return 0
        self.start[slot, stream] = high
        counts = np.bincount(row, weights=high - low, minlength=len(slots)).astype(np.int64)
        self.live_pages[slots, rank] -= counts
        freed = int(counts.sum())
        self.released_total += freed
        many = counts >= MIN_PAGES_TO_SEARCH * streams
        for index in np.flatnonzero(many).tolist():
            self._free_block(rank, int(slots[index]), old[index], self.start[slots[index], columns])
        few = ~many[row] if many.any() else slice(None)
        self._free_ranges(rank, slot[few], stream[few], low[few], high[few])
        crossed = low // TABLE_CHUNK != high // TABLE_CHUNK
        if crossed.any():
            changed = np.zeros(len(slots), dtype=bool)
            changed[row[crossed]] = True
            self._free_dead_chunks(slots[changed])
        return freed

    def close(self, slot: int, keys: Sequence[Hashable] = ()) -> None:
        """Take back ``slot`` and all that it holds. Later reports of its epoch are ignored.

        Args:
            keys: hashes of the prefixes up to the end of each page, from page 0 on. The boundary after the last
                page that was offered is kept as an end.
        """
        began_with = self._began_with.pop(slot, 0)
        if self.prefixes is not None:
            offered, first = int(self._offered[slot]), self.start[slot]
            page = np.arange(min(int(first.min()), offered), offered)
            columns = self._column_of[self._chunk_of[slot, page // TABLE_CHUNK], page % TABLE_CHUNK]
            # Pages that are copies of its own may not be in the cache.
            known = columns if (columns > 0).all() else NO_NUMBERS
            self.prefixes.keep(keys[:offered], known, first, began_with)
        if reserved := self.reserved(slot):
            del self._reserved[slot]
            self._num_reserved -= reserved
            self._chunks_reserved -= self._chunks_missing(slot, reserved)
        count = int(self.num_pages[slot])
        for rank, streams in enumerate(self.columns):
            low = self.start[slot, streams]
            self._free_block(rank, slot, low, np.full_like(low, count))
        self._free_chunks_between(slot, -(-count // TABLE_CHUNK))
        self._first_chunk[slot] = 0
        self._offered[slot] = 0
        self._adopted.pop(slot, None)
        self.start[slot] = 0
        self.num_pages[slot] = 0
        self.live_pages[slot] = 0
        self.epoch[slot] += 1
        self._free_slots.append(slot)

    def _free_block(self, rank: int, slot: int, low: np.ndarray, high: np.ndarray) -> None:
        """Free pages ``low:high`` [streams of the rank] of a slot: a prompt's dead pages, or all of a request's."""
        length = high - low
        streams = np.flatnonzero(length)
        if not streams.size:
            return
        columns, start, stop = self.columns[rank], int(low[streams].min()), int(high[streams].max())
        if int(length.sum()) * MAX_SEARCHED_PER_FREED < (stop - start) * len(streams):
            stream = streams + columns.start
            self._free_ranges(rank, np.full(len(stream), slot), stream, low[streams], high[streams])
            return
        length = length.view(np.uint32)
        for page in range(start, stop, ROWS_AT_ONCE):
            pages = np.arange(page, min(page + ROWS_AT_ONCE, stop), dtype=np.int32)
            # low <= page < low + length in one comparison: a negative difference is a huge unsigned number.
            dead = (pages[:, None] - low).view(np.uint32) < length
            self._free_rows(rank, self._chunk_of[slot, pages // TABLE_CHUNK], pages % TABLE_CHUNK, dead)

    def _free_rows(self, rank: int, chunk: np.ndarray, offset: np.ndarray, dead: np.ndarray) -> None:
        """Free those pages of n rows of the page table that are ``dead``: [n, streams of the rank]."""
        streams = self.columns[rank]
        if self.prefixes is None:
            self._push(rank, self._entries[chunk, offset, streams][dead])
            return
        cached = self._column_of[chunk, offset]
        own = np.flatnonzero(cached <= 0)
        if not own.size:
            self.prefixes.leave_rows(rank, cached, dead)
            return
        ids, mine = self._entries[chunk[own], offset[own], streams], dead[own]
        # The page id of column 0 is no request's.
        shared = mine & self.prefixes.holds(-cached[own], streams, ids)
        dead[own] = shared
        self.prefixes.leave_rows(rank, np.abs(cached), dead)
        self._push(rank, ids[mine & ~shared])

    def _free_ranges(
        self, rank: int, slot: np.ndarray, stream: np.ndarray, low: np.ndarray, high: np.ndarray
    ) -> None:
        """Free pages ``low:high`` of each (slot, stream).

        A decode step moves most ranges by a single page. If all do, ranges need not be expanded into pages.
        """
        counts = (high - low).astype(np.int64)
        total, page = int(counts.sum()), low
        if total != len(counts) or (total and counts.min() != 1):
            which = np.repeat(np.arange(len(counts)), counts)
            page = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts) + low[which]
            slot, stream = slot[which], stream[which]
        chunk = self._chunk_of[slot, page // TABLE_CHUNK].astype(np.int64)
        entry = chunk * TABLE_CHUNK + page % TABLE_CHUNK
        columns = NO_NUMBERS
        if self.prefixes is not None:
            columns = self._column_of.ravel().take(entry)
            cached = columns > 0
            if cached.all():
                self.prefixes.leave(rank, columns, stream)
                return
            self.prefixes.leave(rank, columns[cached], stream[cached])
            entry, stream, columns = entry[~cached], stream[~cached], -columns[~cached]
        ids = self._entries.ravel().take(entry * self._entries.shape[2] + stream)
        if columns.any():
            assert self.prefixes is not None
            cached = self.prefixes.holds(columns, stream, ids)
            self.prefixes.leave(rank, columns[cached], stream[cached])
            ids = ids[~cached]
        self._push(rank, ids)

    def _push(self, rank: int, ids: np.ndarray) -> None:
        """Free page ids of a rank."""
        self._free[rank].push(ids)
        if self._freed is not None:
            self._freed[rank].append(ids)

    def _push_all(self, ids: list[np.ndarray]) -> None:
        for rank, mine in enumerate(ids):
            self._push(rank, mine)

    def _free_dead_chunks(self, slots: np.ndarray) -> None:
        """Free the table chunks that are before the live ranges of all streams: they can serve other requests."""
        ends = self.start[slots].min(1) // TABLE_CHUNK
        passed = ends > self._first_chunk[slots]
        for slot, end in zip(slots[passed].tolist(), ends[passed].tolist()):
            self._free_chunks_between(slot, end)

    def _free_chunks_between(self, slot: int, end: int) -> None:
        first = int(self._first_chunk[slot])
        if end > first:
            self._free_chunks.extend(self._chunk_of[slot, first:end].tolist())
            self._first_chunk[slot] = end

    def watch_freed(self) -> None:
        """Take note of pages that are freed, from now on."""
        self._freed = [[] for _ in range(self.ranks)]

    def take_freed(self) -> list[np.ndarray]:
        """Return the pages of each rank that were freed since the last call, or since they are watched."""
        assert self._freed is not None
        freed = [np.concatenate([NO_NUMBERS, *ids]) for ids in self._freed]
        self.watch_freed()
        return freed

    def held_ids(self, slot: int, rank: int) -> np.ndarray:
        """Return the page ids that ``slot`` holds on ``rank`` (for checks and tests)."""
        count = int(self.num_pages[slot])
        page = np.arange(count)
        chunk = self._chunk_of[slot, page // TABLE_CHUNK]
        ids = self._entries[chunk, page % TABLE_CHUNK, self.columns[rank]]
        return ids[page[:, None] >= self.start[slot, self.columns[rank]][None, :]]

    def free_ids(self, rank: int) -> np.ndarray:
        """Return the page ids that are free on ``rank`` (for checks and tests)."""
        return self._free[rank].all()
