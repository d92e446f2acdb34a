"""Prefix caching: full pages that outlive their requests, found again by the hash of all tokens up to their end.

A **column** is what one page index of one prefix has in all streams. To go on after ``n`` pages of a prefix, a
stream needs its pages from its first live page at that boundary on, and no others. A boundary whose needed
pages are all still there can be hit. An **end** is a boundary where a request stopped or which was hit: its
pages are kept as long as there is room. Pages that no running request and no end needs are given away first,
those of the column that was left longest ago before others; after them whole ends, by least recent use. An end
that goes for want of room is offered to a **lower tier** first, if there is one.

This module does not depend on vLLM.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .column_queue import ColumnQueue

GONE = 0
"""Stands for a page id in a column whose page was given away. Page 0 is padding on every rank."""

COLUMNS_AT_ONCE = 32
"""So many columns are searched together for pages to give away."""

MOST_ENDS = np.iinfo(np.int16).max
"""Most ends that are kept: so many ends can be counted of a page."""


@dataclass
class Hit:
    """A cached prefix that a request can begin with.

    Attributes:
        pages: pages of the prefix.
        low: first page that any stream needs.
        columns: [pages - low] numbers of the columns of pages ``low : pages``.
        first: [W] int32 first page that each stream needs.
    """

    pages: int
    low: int
    columns: np.ndarray
    first: np.ndarray

    @property
    def needed(self) -> np.ndarray:
        """Whether each stream needs each page: [pages - low, W]."""
        # In the dtype of ``first``: comparing numbers of two dtypes takes three times as long.
        return np.arange(self.low, self.pages, dtype=np.int32)[:, None] >= self.first

    @property
    def last(self) -> int:
        """The column where the prefix ends."""
        return int(self.columns[-1])


class LowerTier(Protocol):
    """Where prefixes go that are kept no longer for want of room."""

    def save(self, keys: Sequence[Hashable], hit: Hit, ids: np.ndarray, first: np.ndarray) -> None:
        """Take in a whole prefix before its pages are given away.

        Args:
            keys: hashes of the hit's columns.
            hit: which pages are needed.
            ids: [n, W] their page ids. Those of pages that are not needed mean nothing.
            first: [n, W] first live pages at the columns' ends.
        """

    def supersede(self, key: Hashable) -> None:
        """Note that the prefix which ends with ``key`` has gone on, so that it is the first to be given away."""


@dataclass
class _End:
    hit: Hit
    uses: int = 0
    superseded: bool = False


class PrefixCache:
    """Columns of cached pages, over the W streams of all ranks.

    Args:
        ranks: the streams of each rank.
        num_columns: most columns; number 0 stands for "no column" and is one of them.

    Attributes:
        idle: pages of each rank that no running request holds.
        evicted_total: pages that were given away.
        lower: the lower tier, if there is one.
    """

    def __init__(self, ranks: Sequence[slice], num_columns: int) -> None:
        self._ranks, width = list(ranks), ranks[-1].stop
        # Memory that was never written is not used: most columns never are. Zero is GONE.
        self._ids = np.zeros((num_columns, width), dtype=np.int32)
        # First live page at the column's end: exact, or known from earlier in the prefix and so a smaller number.
        self._first = np.zeros((num_columns, width), dtype=np.int32)
        # Running requests that hold the page, and ends that need it.
        self._busy = np.zeros((num_columns, width), dtype=np.int16)
        self._needed = np.zeros((num_columns, width), dtype=np.int16)
        # Tells the prefixes apart that a column number was used for.
        self._life = np.zeros(num_columns, dtype=np.int64)
        self._hash: list[Hashable] = [None] * num_columns
        self._column: dict[Hashable, int] = {}
        self._free = list(range(num_columns - 1, 0, -1))
        self._ends: OrderedDict[int, _End] = OrderedDict()  # least recently used first
        # Columns in which pages may be that nobody needs.
        self._left = ColumnQueue(num_columns)
        self.idle = [0] * len(self._ranks)
        self.evicted_total = 0
        self.lower: LowerTier | None = None

    def __len__(self) -> int:
        """Return the number of prefixes' boundaries that are known, whole or not."""
        return len(self._column)

    @property
    def free_columns(self) -> int:
        return len(self._free)

    # Pages come.

    def add(self, keys: Sequence[Hashable], ids: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Take in full pages that running requests hold. Who comes first stays; later ones fill what is gone.

        There must be as many free columns (:meth:`evict`), or some pages are not cached.

        Args:
            keys: hash of the prefix up to the end of each of the n pages.
            ids: [n, W] page ids; 0 where the request has none any more.
            first: [n, W] first live page of the request now, which is a lower bound for all these boundaries.

        Returns:
            [n] int32 the columns in which the request's ids are now: negative if some of them are not, because
            another request came first, and 0 if none is.
        """
        columns = np.zeros(len(keys), dtype=np.int32)
        new: dict[int, int] = {}
        for index, key in enumerate(keys):
            column = self._column.get(key, 0)
            if column in new:
                continue  # two requests have come to the same boundary at once
            if column:
                mine = ids[index] != GONE
                holes = (self._ids[column] == GONE) & mine
                if holes.any():
                    self._ids[column, holes] = ids[index, holes]
                    self._busy[column, holes] = 1
                    columns[index] = column if holes.sum() == mine.sum() else -column
            elif self._free:
                column = self._free.pop()
                self._column[key], self._hash[column] = column, key
                self._life[column] += 1
                columns[index] = column
                new[column] = index
        if new:
            made, rows = list(new), list(new.values())
            # Nobody needs a page of a column that was free.
            self._ids[made], self._busy[made] = ids[rows], ids[rows] != GONE
            self._first[made] = first[rows]
        return columns

    def lives(self, columns: np.ndarray) -> np.ndarray:
        """Return what tells these uses of the columns from later ones."""
        return self._life[columns]

    def tighten(self, columns: np.ndarray, lives: np.ndarray, first: np.ndarray) -> None:
        """Learn the first live pages [n, W] at the ends of columns, unless they stand for other prefixes by now."""
        current = (self._life[columns] == lives) & (columns > 0)
        if not current.all():
            columns, first = columns[current], first[current]
        self._first[columns] = np.maximum(self._first[columns], first)
        if self._ends:
            for column in columns.tolist():
                if column in self._ends:
                    end = self._ends[column]
                    self._forget_needs(end.hit)
                    keep = self._first[column].copy()
                    low = int(keep.min())
                    end.hit = Hit(end.hit.pages, low, end.hit.columns[low - end.hit.low :], keep)
                    self._needed[end.hit.columns] += end.hit.needed

    # Prefixes are found.

    def columns_of(self, keys: Sequence[Hashable]) -> np.ndarray:
        """Return the columns [n] int32 of prefixes, given the hash of each; 0 for those that are not known."""
        return np.fromiter((self._column.get(key, 0) for key in keys), dtype=np.int32, count=len(keys))

    def find(self, keys: Sequence[Hashable]) -> Hit | None:
        """Return the longest prefix, of at most ``len(keys)`` pages, of which every needed page is there."""
        columns = self.columns_of(keys)
        known = np.flatnonzero(columns)
        if not known.size:
            return None
        pages = int(known[-1]) + 1
        if end := self._ends.get(int(columns[pages - 1])):
            return end.hit
        hit = self._boundary(columns[:pages])
        if self._is_whole(hit):
            return hit
        # Some page is gone. One pass finds for every boundary where the last page is that is gone before it.
        columns = columns[:pages]
        page = np.arange(1, pages + 1, dtype=np.int32)[:, None]
        gone = np.maximum.accumulate(page * (self._ids[columns] == GONE), axis=0)
        whole = np.flatnonzero((gone <= self._first[columns]).all(1) & (columns > 0))
        return self._boundary(columns[: whole[-1] + 1]) if whole.size else None

    def _boundary(self, columns: np.ndarray) -> Hit:
        """The prefix that ends with the last of columns [pages], whether it is whole or not."""
        first = self._first[columns[-1]].copy()
        low = int(first.min())
        return Hit(len(columns), low, columns[low:], first)

    def _is_whole(self, hit: Hit) -> bool:
        """Return whether all pages are there that a prefix needs."""
        return not (hit.needed & (self._ids[hit.columns] == GONE)).any()

    def size(self, hit: Hit) -> list[int]:
        """Return the number of pages of each rank that a hit needs."""
        return [int((hit.pages - hit.first[streams]).sum(dtype=np.int64)) for streams in self._ranks]

    def idle_of(self, hit: Hit) -> list[int]:
        """Return the number of pages of each rank that a hit needs and that no running request holds."""
        return self.idle_among(hit.columns, hit.needed)

    def _count(self, pages: np.ndarray) -> list[int]:
        return [int(np.count_nonzero(pages[:, streams])) for streams in self._ranks]

    def ids(self, hit: Hit) -> np.ndarray:
        """Return the page ids [pages - low, W] of a hit. Those of pages that are not needed mean nothing."""
        return self._ids[hit.columns]

    def first_live(self, columns: np.ndarray) -> np.ndarray:
        """Return the first live pages [n, W] at the ends of columns, or smaller numbers."""
        return self._first[columns]

    def there(self, columns: np.ndarray) -> np.ndarray:
        """Return whether each page [n, W] of columns is there. Of column 0 none is."""
        return self._ids[columns] != GONE

    def idle_among(self, columns: np.ndarray, pages: np.ndarray) -> list[int]:
        """Return the number of those ``pages`` [n, W] of columns, for each rank, that nobody holds."""
        return self._count(pages & (self._busy[columns] == 0))

    def hold(self, hit: Hit) -> None:
        """Let one more running request hold the hit's pages, and keep the hit as an end."""
        self.hold_pages(hit.columns, hit.needed)
        end = self._ends.pop(hit.last, None) or self._new_end(hit)
        end.uses += 1
        end.superseded = False
        self._ends[hit.last] = end

    def hold_pages(self, columns: np.ndarray, pages: np.ndarray) -> None:
        """Let those ``pages`` [n, W] of columns that are there be held once more, until :meth:`leave_rows`."""
        busy = self._busy[columns]
        self.idle = [idle - woken for idle, woken in zip(self.idle, self._count(pages & (busy == 0)))]
        busy += pages
        self._busy[columns] = busy

    def keep(self, keys: Sequence[Hashable], columns: np.ndarray, first: np.ndarray, replaces: int = 0) -> None:
        """Make an end of a boundary, if it is still whole.

        Args:
            keys: hashes of all its pages.
            columns: [n] the columns, if they are known, of the last n pages.
            first: [W] first page that a running request holds, in these columns.
            replaces: the column of the end that the request began with. If nobody else has used that, it is the
                first to be given away: a conversation goes on from its last turn.
        """
        column = self._column.get(keys[-1], 0) if keys else 0
        end = self._ends.pop(column, None)
        if end is None and column:
            low = len(keys) - len(columns)
            if len(columns) and columns[-1] == column and (self._first[column] >= first).all():
                every = np.concatenate([np.zeros(low, dtype=np.int32), columns])
                end = self._new_end(self._boundary(every))
            else:
                end = self._end_if_whole(self.columns_of(keys))
        if end is not None:
            end.superseded = False
            self._ends[column] = end
        if replaces != column and replaces in self._ends and self._ends[replaces].uses <= 1:
            self._ends.move_to_end(replaces, last=False)
            if end is not None:
                self._ends[replaces].superseded = True
                if self.lower is not None:
                    self.lower.supersede(self._hash[replaces])

    def keep_end(self, pages: int, columns: np.ndarray) -> None:
        """Make an end of a boundary, if it is whole, or the one that it is the most recently used.

        Args:
            pages: pages of the prefix.
            columns: [n] the columns of the last n of them.
        """
        column = int(columns[-1])
        every = np.concatenate([np.zeros(pages - len(columns), dtype=np.int32), columns])
        end = self._ends.pop(column, None) or self._end_if_whole(every)
        if end is not None:
            end.superseded = False
            self._ends[column] = end

    def supersede(self, key: Hashable) -> None:
        """Give the end that a hash stands for away before others."""
        column = self._column.get(key, 0)
        if column in self._ends:
            self._ends.move_to_end(column, last=False)

    def _end_if_whole(self, columns: np.ndarray) -> _End | None:
        """An end of the boundary after all ``columns`` [pages] of a prefix."""
        hit = self._boundary(columns)
        return self._new_end(hit) if self._is_whole(hit) else None

    def _new_end(self, hit: Hit) -> _End:
        if len(self._ends) >= MOST_ENDS:
            self._drop_first()
        needed = self._needed[hit.columns]
        needed += hit.needed
        self._needed[hit.columns] = needed
        return _End(hit)

    # Pages go.

    def leave_rows(self, rank: int, columns: np.ndarray, left: np.ndarray) -> None:
        """Let a running request leave cached pages of different columns.

        Args:
            rank: whose pages these are.
            columns: [n] the columns.
            left: [n, streams of the rank] whether each of their pages is left.
        """
        streams = self._ranks[rank]
        busy = self._busy[columns, streams]
        busy -= left
        self._busy[columns, streams] = busy
        idle = busy == 0
        idle &= left
        self.idle[rank] += int(np.count_nonzero(idle))
        idle &= self._needed[columns, streams] == 0
        self._left.put(columns[idle.any(1)])

    def holds(self, columns: np.ndarray, streams: np.ndarray | slice, ids: np.ndarray) -> np.ndarray:
        """Return whether pages of a running request are the cached ones.

        Args:
            columns: [n]
            streams: [n] of each page; or a slice of S streams, of which all pages of the columns are meant.
            ids: [n], or [n, S] the ids that the request has.
        """
        return self._ids[columns, streams] == ids

    def leave(self, rank: int, columns: np.ndarray, streams: np.ndarray) -> None:
        """Let running requests leave single cached pages [n]. A page is there once for each that leaves it."""
        # Each look at these arrays is a miss of the CPU's caches, so there are as few as possible.
        page = columns.astype(np.int64) * self._ids.shape[1] + streams
        busy = self._busy.ravel()
        holders = busy.take(page)
        if (holders > 1).any():
            alone, shared = page[holders == 1], page[holders > 1]
            np.subtract.at(busy, shared, np.int16(1))
            page = np.concatenate([alone, np.unique(shared[busy[shared] == 0])])
        busy[page] = 0
        self.idle[rank] += len(page)
        self._left.put(page[self._needed.ravel().take(page) == 0] // self._ids.shape[1])

    def evict(self, shortage: Sequence[int], columns: int = 0) -> list[np.ndarray]:
        """Give pages away until there are as many as are short on each rank, and as many free columns.

        Returns:
            The ids of each rank. They are fewer than asked for only if nothing is left to give away.
        """
        short = list(shortage)
        found: list[list[np.ndarray]] = [[] for _ in short]
        while any(missing > 0 for missing in short) or len(self._free) < columns:
            wanted = max(max(short) // self._ids.shape[1], columns - len(self._free), 1)
            which = self._left.take(min(wanted, COLUMNS_AT_ONCE))
            if not which.size:
                if not self._ends:
                    break
                self._drop_first()
                continue
            for rank, ids in enumerate(self._empty(which)):
                found[rank].append(ids)
                short[rank] -= len(ids)
        return [np.concatenate(ids) if ids else np.empty(0, dtype=np.int32) for ids in found]

    def _empty(self, which: np.ndarray) -> list[np.ndarray]:
        """Take what nobody needs out of columns; return the ids of each rank."""
        ids = self._ids[which]
        dead = (ids != GONE) & (self._busy[which] == 0) & (self._needed[which] == 0)
        taken = [ids[:, streams][dead[:, streams]] for streams in self._ranks]
        self.idle = [idle - len(part) for idle, part in zip(self.idle, taken)]
        self.evicted_total += sum(map(len, taken))
        ids[dead] = GONE
        self._ids[which] = ids
        for column in which[~ids.any(1)].tolist():
            self._unlink(column)
            self._free.append(column)
        return taken

    def _unlink(self, column: int) -> None:
        key = self._hash[column]
        if key is not None:
            del self._column[key]
            self._hash[column] = None

    def _drop_first(self) -> None:
        """Keep the least recently used end no longer."""
        _, end = self._ends.popitem(last=False)
        if self.lower is not None and not end.superseded:
            keys = [self._hash[column] for column in end.hit.columns.tolist()]
            self.lower.save(keys, end.hit, self.ids(end.hit), self._first[end.hit.columns])
        self._forget_needs(end.hit)

    def _forget_needs(self, hit: Hit) -> None:
        mask = hit.needed
        needed = self._needed[hit.columns]
        needed -= mask
        self._needed[hit.columns] = needed
        mask &= needed == 0
        mask &= self._busy[hit.columns] == 0
        self._left.put(hit.columns[mask.any(1)])

    def held_ids(self, rank: int) -> np.ndarray:
        """Return the page ids of a rank that are in the cache (for checks and tests)."""
        ids = self._ids[:, self._ranks[rank]]
        return ids[ids != GONE]

    def clear(self) -> list[np.ndarray]:
        """Forget all prefixes; return the ids of each rank that are free now. Running requests keep theirs."""
        while self._ends:
            self._forget_needs(self._ends.popitem()[1].hit)
        for column in list(self._column.values()):
            self._unlink(column)
        return self.evict(self.idle)
