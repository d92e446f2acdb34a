"""The lower tier of the prefix cache: prefixes in host memory, which come back when a request begins with them.

The scheduler's book of it. What goes out are whole ends (:mod:`.prefixes`), when they are kept no longer in device
memory for want of room: a prefix that somebody may go on with, and only the pages that it needs. What comes back
are the pages of a prefix that device memory lacks. They are pages of the device's cache from then on, with ids of
their own, so a request that waits for them finds them like any other cached prefix.

Workers copy at the beginning of the next step: first what goes out, then what comes back. A host page that comes
back is held until it has arrived, so nothing that goes out in between is written over it.

This module does not depend on vLLM.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .free_ids import FreeIds
from .pool import PagePool
from .prefixes import GONE, Hit, PrefixCache


@dataclass(frozen=True)
class Copies:
    """Pages that are copied between device and host memory.

    Attributes:
        pages, host: for each rank, the page ids [n] in device memory, and those in host memory.
    """

    pages: list[np.ndarray]
    host: list[np.ndarray]


@dataclass
class Found:
    """A prefix that host memory has.

    Attributes:
        keys: hashes of the hit's columns.
        hit: where it is in host memory.
        columns: [n] columns of the device's cache; 0 for those that it does not know.
        there, absent: [n, W] pages that the prefix needs, and that device memory has or lacks.
        pages: pages of each rank that are free or idle, and will not be once the prefix is held.
        gained: pages of the prefix beyond those that a request would begin with otherwise.
    """

    keys: list[Hashable]
    hit: Hit
    columns: np.ndarray
    there: np.ndarray
    absent: np.ndarray
    pages: list[int]
    gained: int


@dataclass
class _Fetch:
    """Pages under way. ``ids`` [n, W] are their page ids in device memory, GONE elsewhere.

    ``wanted`` is false once the cache has been emptied.
    """

    number: int
    found: Found
    ids: np.ndarray
    first: np.ndarray
    wanted: bool = True


class HostTier:
    """The book of prefixes in host memory, the lower tier of a pool's prefix cache.

    A page of host memory has a number of its own, for each rank from 1 on.

    Args:
        pool: a pool with a prefix cache.
        blocks: pages of host memory for each stream.
        num_columns: most columns of prefixes.

    Attributes:
        saved_total, fetched_total: pages that went to host memory, and that came back.
        hit_pages_total: pages of prefixes, each counted once for all streams, that requests have found there.
        last_fetch: number of the last fetch that was begun.
    """

    def __init__(self, pool: PagePool, blocks: int, num_columns: int) -> None:
        assert pool.prefixes is not None
        self._pool, self._cache = pool, pool.prefixes
        self._cache.lower = self
        self._book = PrefixCache(pool.columns, num_columns)
        self.capacity = [blocks * streams for streams in pool.streams.tolist()]
        self._free = [FreeIds(1, capacity) for capacity in self.capacity]
        self._saves: list[tuple[np.ndarray, np.ndarray]] = []  # ids and host pages [n, W] of each
        self._begun: list[_Fetch] = []
        self._under_way: deque[_Fetch] = deque()
        self._fetching: dict[Hashable, int] = {}
        self.saved_total = self.fetched_total = self.hit_pages_total = self.last_fetch = 0

    @property
    def used_total(self) -> int:
        """Pages of host memory that hold something, summed over the ranks."""
        return sum(self.capacity) - sum(free.left for free in self._free)

    @property
    def is_fetching(self) -> bool:
        """Whether pages are under way."""
        return bool(self._under_way)

    # Prefixes go out: what the cache calls.

    def save(self, keys: Sequence[Hashable], hit: Hit, ids: np.ndarray, first: np.ndarray) -> None:
        """Take in a prefix, if there is room. See :meth:`.prefixes.LowerTier.save`."""
        book, needed = self._book, hit.needed
        columns = book.columns_of(keys)
        there = needed & book.there(columns)
        # What is there already must not be given away for the rest.
        book.hold_pages(columns, there)
        absent = needed & ~there
        if self._make_room(self._count(absent), len(keys)):
            host = np.full(ids.shape, GONE, dtype=np.int32)
            for rank, streams in enumerate(self._pool.columns):
                mine = absent[:, streams]
                host[:, streams][mine] = self._free[rank].pop(int(np.count_nonzero(mine)))
            book.add(keys, host, first)
            columns = book.columns_of(keys)
            book.tighten(columns, book.lives(columns), first)
            book.keep_end(hit.pages, columns)
            if absent.any():
                self._saves.append((np.where(absent, ids, GONE), host))
                self.saved_total += int(np.count_nonzero(absent))
            there = needed
        self._leave(columns, there)

    def supersede(self, key: Hashable) -> None:
        """See :meth:`.prefixes.LowerTier.supersede`."""
        self._book.supersede(key)

    def _make_room(self, pages: Sequence[int], columns: int) -> bool:
        """Have so many host pages of each rank free, and so many columns; return False if there is no room."""
        if any(count > free.left + idle for count, free, idle in zip(pages, self._free, self._book.idle)):
            return False
        short = [count - free.left for count, free in zip(pages, self._free)]
        for free, ids in zip(self._free, self._book.evict(short, columns)):
            free.push(ids)
        return self._book.free_columns >= columns

    # Prefixes come back: what the manager calls.

    def find(self, keys: Sequence[Hashable], pages: int) -> Found | None:
        """Return the longest prefix, of more than ``pages`` and at most ``len(keys)`` pages, in host memory."""
        hit = self._book.find(keys)
        if hit is None or hit.pages <= pages:
            return None
        mine = list(keys[hit.low : hit.pages])
        columns = self._cache.columns_of(mine)
        there = hit.needed & self._cache.there(columns)
        absent = hit.needed & ~there
        woken = [new + idle for new, idle in zip(self._count(absent), self._cache.idle_among(columns, there))]
        return Found(mine, hit, columns, there, absent, woken, hit.pages - pages)

    def is_under_way(self, found: Found) -> bool:
        """Return whether any page of a prefix is being fetched."""
        return bool(self._fetching) and not self._fetching.keys().isdisjoint(found.keys)

    def fetch(self, found: Found) -> None:
        """Begin to fetch what device memory lacks of a prefix. The pool must have room for ``found.pages``."""
        # Room is made in device memory, and then perhaps in host memory, after all that is needed is held.
        self._cache.hold_pages(found.columns, found.there)
        self._book.hold_pages(found.hit.columns, found.absent)
        self._book.keep_end(found.hit.pages, found.hit.columns)
        ids = self._pool.take_for_cache(found.absent)
        self.last_fetch += 1
        self.hit_pages_total += found.gained
        fetch = _Fetch(self.last_fetch, found, ids, self._book.first_live(found.hit.columns))
        self._begun.append(fetch)
        self._under_way.append(fetch)
        self._fetching |= dict.fromkeys(found.keys, fetch.number)

    def arrive(self, last: int) -> bool:
        """Enter the pages of all fetches up to the number ``last`` into the device's cache.

        Returns:
            Whether there were any.
        """
        arrived = False
        while self._under_way and self._under_way[0].number <= last:
            fetch, arrived = self._under_way.popleft(), True
            found = fetch.found
            for key in found.keys:
                if self._fetching.get(key) == fetch.number:
                    del self._fetching[key]
            self._leave(found.hit.columns, found.absent)
            if fetch.wanted:
                self._pool.put_in_cache(found.keys, found.hit.pages, fetch.ids, fetch.first)
                self.fetched_total += int(np.count_nonzero(found.absent))
            else:
                self._pool.give_back(fetch.ids)
            self._pool.leave_in_cache(found.columns, found.there)
        return arrived

    def take_copies(self) -> tuple[Copies | None, Copies | None]:
        """Return what goes out and what comes back since the last call; each is None if nothing does."""
        if not self._saves and not self._begun:
            return None, None
        out = self._copies(self._saves)
        back = self._copies(
            [(one.ids, np.where(one.found.absent, self._book.ids(one.found.hit), GONE)) for one in self._begun]
        )
        self._saves, self._begun = [], []
        return out, back

    def _copies(self, parts: list[tuple[np.ndarray, np.ndarray]]) -> Copies | None:
        if not parts:
            return None
        ids, host = (np.concatenate(side) for side in zip(*parts))
        pages, places = [], []
        for streams in self._pool.columns:
            here, there = ids[:, streams], host[:, streams]
            which = here != GONE
            here, there = here[which], there[which]
            if len(parts) > 1:
                # A host page that was given away and taken again within a step is to hold what was saved last.
                _, last = np.unique(there[::-1], return_index=True)
                last = len(there) - 1 - last
                here, there = here[last], there[last]
            pages.append(here)
            places.append(there)
        return Copies(pages, places)

    def clear(self) -> None:
        """Forget everything. Pages under way arrive, and are given back then."""
        self._saves.clear()
        self._fetching.clear()
        for fetch in self._under_way:
            fetch.wanted = False
        for free, ids in zip(self._free, self._book.clear()):
            free.push(ids)

    # Internal helpers.

    def _count(self, pages: np.ndarray) -> list[int]:
        return [int(np.count_nonzero(pages[:, streams])) for streams in self._pool.columns]

    def _leave(self, columns: np.ndarray, pages: np.ndarray) -> None:
        for rank, streams in enumerate(self._pool.columns):
            self._book.leave_rows(rank, columns, pages[:, streams])

    def free_ids(self, rank: int) -> np.ndarray:
        """Return the host pages that are free on ``rank`` (for checks and tests)."""
        return self._free[rank].all()

    def held_ids(self, rank: int) -> np.ndarray:
        """Return the host pages of ``rank`` that hold something (for checks and tests)."""
        return self._book.held_ids(rank)
