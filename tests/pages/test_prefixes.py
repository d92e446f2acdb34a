"""Cached prefixes and the page pool as one state machine, against a model of plain sets."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_fox.kernels.paged import TABLE_CHUNK
from vllm_fox.pages.pool import PagePool
from vllm_fox.pages.prefixes import PrefixCache

BLOCKS, STREAMS, SLOTS = 31, (3, 2), 4
RANKS, WIDTH = len(STREAMS), sum(STREAMS)


def first_live(prefix: tuple[int, ...]) -> np.ndarray:
    """The true first live page [W] after a prefix of pages: it never falls while the prefix grows."""
    rates = (0, 1, 2, 3, 5)
    return np.array([max(0, len(prefix) - 1 - keep) if keep else 0 for keep in rates], dtype=np.int32)


class PrefixMachine(RuleBasedStateMachine):
    """Requests are texts of pages over a small alphabet, so that many begin alike.

    The device's memory is played by ``written``: which prefix each page was written for. A request that reads a
    page which it needs must find its own prefix there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(
            num_blocks=BLOCKS, streams=STREAMS, num_slots=SLOTS, num_chunks=7, max_chunks=3, cached_columns=20
        )
        self.written: dict[tuple[int, int], tuple[tuple[int, ...], int]] = {}  # (stream, id) -> (prefix, stream)
        self.texts: dict[int, tuple[int, ...]] = {}  # slot -> its pages so far
        self.first: dict[int, np.ndarray] = {}  # slot -> first live pages that the device has
        self.mail: list[dict[str, Any]] = []
        self.promised: dict[int, tuple[int, ...]] = {}
        self.ended: list[tuple[int, ...]] = []
        # Pages that a worker has filled with NaN since they were last handed out.
        self.pool.watch_freed()
        self.poisoned = [set(self.pool.free_ids(rank).tolist()) for rank in range(RANKS)]

    def under_way(self, rank: int) -> list[int]:
        """Pages of a rank that are neither free nor cached nor a request's."""
        return []

    def held(self, rank: int) -> list[int]:
        """Pages of a rank that are held, each as often as it is."""
        return [page for slot in self.texts for page in self.pool.held_ids(slot, rank).tolist()]

    def keys(self, text: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [text[:count] for count in range(1, len(text) + 1)]

    def room(self) -> int:
        return min((self.pool._available()[rank]) // STREAMS[rank] for rank in range(RANKS)) - sum(
            map(len, self.promised.values())
        )

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=9), again=st.booleans(), data=st.data())
    @precondition(lambda self: self.pool.has_free_slot)
    def begin(self, text: list[int], again: bool, data: st.DataObject) -> None:
        """A prompt, perhaps what an earlier request ended with and more. It begins with what is cached of it."""
        prompt = tuple(text)
        if again and self.ended:
            prompt = data.draw(st.sampled_from(self.ended)) + prompt
        prompt = prompt[: 3 * TABLE_CHUNK - 8]
        assert self.pool.prefixes is not None
        hit = self.pool.prefixes.find(self.keys(prompt)[:-1])
        begun = hit.pages if hit else 0
        idle = self.pool.prefixes.idle_of(hit) if hit else [0] * len(STREAMS)
        woken = max(-(-pages // count) for pages, count in zip(idle, STREAMS))
        new = len(prompt) - begun
        if new + woken > self.room():
            return
        if hit and not self.pool.chunks_available_after(hit, new):
            return
        if not hit and not self.pool.chunks_available(0, new):
            return
        slot = self.pool.open()
        self.texts[slot], self.first[slot] = prompt[:begun], np.zeros(WIDTH, dtype=np.int32)
        if hit:
            self.pool.adopt(slot, hit)
            # The range is exact or was known earlier in the prefix.
            assert (hit.first <= first_live(prompt[:begun])).all()
            self.first[slot] = hit.first.copy()
        self.pool.reserve(slot, new)
        self.promised[slot] = prompt[begun:]

    @rule(data=st.data(), page=st.integers(0, 1))
    @precondition(lambda self: self.texts)
    def grow(self, data: st.DataObject, page: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        held = len(self.texts[slot]) + len(self.promised.get(slot, ()))
        if held >= 3 * TABLE_CHUNK or self.room() < 1 or not self.pool.chunks_available(slot, 1):
            return
        self.pool.reserve(slot, 1)
        self.promised[slot] = (*self.promised.get(slot, ()), page)

    @rule(reported=st.booleans(), offered=st.sampled_from([True, True, True, False]))
    @precondition(lambda self: self.promised)
    def step(self, reported: bool, offered: bool) -> None:
        """Pages are handed out and written, put into the cache, and the device notes live ranges for the report."""
        columns = self.pool.hand_out()
        adopted = len(columns.ids) - sum(map(len, self.promised.values()))
        for rank, freed in enumerate(self.pool.take_freed()):
            ids = columns.ids[:, self.pool.columns[rank]]
            free = set(self.pool.free_ids(rank).tolist())
            self.poisoned[rank] |= set(freed.tolist())
            # Pages that a request begins with and no longer sees may have made room for those that it gets.
            self.poisoned[rank] -= set(ids[:adopted].ravel().tolist()) - free
            self.poisoned[rank] -= set(ids[adopted:].ravel().tolist())
            self.poisoned[rank] -= set(self.under_way(rank))
            assert self.poisoned[rank] == free
        handed_out = iter(columns.ids[adopted:])
        for slot, new in self.promised.items():
            for page, got in zip(new, itertools.islice(handed_out, len(new))):
                self.texts[slot] += (page,)
                for stream in range(WIDTH):
                    self.written[stream_of(stream), int(got[stream])] = (self.texts[slot], stream)
        slots, pages = [], []
        if offered:
            assert self.pool.prefixes is not None
            self.pool.offer(
                {slot: self.keys(self.texts[slot])[self.pool.offered(slot) :] for slot in self.promised}
            )
        for slot, new in self.promised.items():
            text = self.texts[slot]
            # What is offered late is so by one page: a token that the scheduler does not know yet fills it.
            if self.pool.offered(slot) >= len(text) - 1:
                slots += [slot] * len(new)
                pages += range(len(text) - len(new) + 1, len(text) + 1)
        self.promised.clear()
        if reported and slots and self.pool.prefixes is not None:
            every, ends = np.array(slots), np.array(pages)
            cached = self.pool.cached_columns(every, ends)
            first = np.stack([first_live(self.texts[slot][:count]) for slot, count in zip(slots, pages)])
            self.mail.append(
                {"slots": every, "epochs": self.pool.epoch[every].copy(), "columns": cached, "first": first,
                 "lives": self.pool.prefixes.lives(cached)}
            )  # fmt: skip
            # The device's own ranges move at once, the scheduler's when it hears of them.
            for slot in set(slots):
                self.first[slot] = np.maximum(self.first[slot], first_live(self.texts[slot]))

    @rule(data=st.data(), keep=st.booleans())
    @precondition(lambda self: self.mail)
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        """Late, out of order, twice, or for requests that have ended."""
        which = data.draw(st.integers(0, len(self.mail) - 1))
        report = self.mail[which] if keep else self.mail.pop(which)
        assert self.pool.prefixes is not None
        self.pool.prefixes.tighten(report["columns"], report["lives"], report["first"])
        last = np.append(report["slots"][1:] != report["slots"][:-1], True)
        for rank, streams in enumerate(self.pool.columns):
            self.pool.release(
                rank, report["slots"][last], report["epochs"][last], report["first"][last][:, streams]
            )

    @rule(data=st.data(), known=st.booleans())
    @precondition(lambda self: self.texts)
    def end(self, data: st.DataObject, known: bool) -> None:
        slot = data.draw(st.sampled_from(sorted(self.texts)))
        text = self.texts.pop(slot)
        self.promised.pop(slot, None)
        del self.first[slot]
        self.pool.close(slot, self.keys(text) if known else ())
        if text:
            self.ended.append(text[: 2 * TABLE_CHUNK])

    @rule(really=st.integers(1, 30))
    @precondition(lambda self: len(self.ended) > 3)
    def reset(self, really: int) -> None:
        if really != 13:  # seldom, or nothing would ever be cached
            return
        self.pool.forget_prefixes()
        assert self.pool.prefixes is not None and len(self.pool.prefixes) == 0 and not any(self.pool.prefixes.idle)

    @invariant()
    def every_page_is_free_or_held_or_cached(self) -> None:
        cache = self.pool.prefixes
        assert cache is not None
        for rank, streams in enumerate(self.pool.columns):
            free = self.pool.free_ids(rank).tolist()
            cached = cache.held_ids(rank).tolist()
            assert len(set(free)) == len(free) and len(set(cached)) == len(cached)
            own = [
                page for slot in self.texts for page in self.pool.held_ids(slot, rank).tolist()
                if page not in set(cached)
            ]  # fmt: skip
            everything = sorted([*free, *cached, *own, *self.under_way(rank)])
            assert everything == list(range(STREAMS[rank], BLOCKS * STREAMS[rank]))
            # A cached page is busy as often as requests hold it.
            held = self.held(rank)
            ids, busy = cache._ids[:, streams], cache._busy[:, streams]
            assert {page: held.count(page) for page in cached} == dict(
                zip(ids[ids != 0].tolist(), busy[ids != 0].tolist())
            )
            assert cache.idle[rank] == int(((ids != 0) & (busy == 0)).sum())
            assert not busy[ids == 0].any()

    @invariant()
    def ends_need_what_they_need(self) -> None:
        cache = self.pool.prefixes
        assert cache is not None
        needed = np.zeros_like(cache._needed)
        for end in cache._ends.values():
            needed[end.hit.columns] += end.hit.needed
        assert np.array_equal(needed, cache._needed)
        assert not ((cache._ids == 0) & (needed > 0)).any()
        # Whatever nobody needs can be found when pages are short.
        dead = ((cache._ids != 0) & (cache._busy == 0) & (needed == 0)).any(1)
        assert all(column in cache._left for column in np.flatnonzero(dead).tolist())

    @invariant()
    def requests_find_their_own_prefix(self) -> None:
        """In every page that the device may still read."""
        for slot, text in self.texts.items():
            for page in range(len(text)):
                ids = self.pool._entries[self.pool._chunk_of[slot, page // TABLE_CHUNK], page % TABLE_CHUNK]
                for stream in range(WIDTH):
                    if page >= self.first[slot][stream] and page < self.pool.num_pages[slot]:
                        assert page >= self.pool.start[slot][stream]
                        found = self.written[stream_of(stream), int(ids[stream])]
                        assert found == (text[: page + 1], stream)

    @invariant()
    def nothing_stays_when_nobody_runs(self) -> None:
        if not self.texts and not any(self.held(rank) + self.under_way(rank) for rank in range(RANKS)):
            assert self.pool.used_blocks == 0 and self.pool.used_total == 0
            assert len(self.pool._free_slots) == SLOTS and len(self.pool._free_chunks) == 6


def stream_of(stream: int) -> int:
    """The rank of a stream: page ids are numbers of a rank's pool, whatever the stream."""
    return 0 if stream < STREAMS[0] else 1


PrefixMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestPrefixes = PrefixMachine.TestCase


def test_a_report_of_an_earlier_prefix_is_ignored() -> None:
    """Its column stands for another prefix by now."""
    cache, ids, zeros = PrefixCache([slice(0, 2)], 2), np.array([[5, 6]]), np.zeros(2, dtype=np.int32)
    columns = cache.add(["one"], ids, zeros[None])
    lives = cache.lives(columns)
    cache.leave_rows(0, columns, np.ones((1, 2), dtype=bool))
    assert sorted(cache.evict([2])[0].tolist()) == [5, 6]
    assert cache.add(["two"], ids, zeros[None]).tolist() == columns.tolist()
    cache.tighten(columns, lives, np.array([[3, 3]]))
    hit = cache.find(["two"])
    assert hit is not None and hit.first.tolist() == [0, 0]


def one_page_each(keys: list[str], busy_until: int) -> tuple[PrefixCache, np.ndarray]:
    """A cache of one rank of two streams, whose request left the pages of stream 0 before ``busy_until``."""
    cache = PrefixCache([slice(0, 2)], 5)
    ids = np.arange(2, 2 + 2 * len(keys), dtype=np.int32).reshape(-1, 2)
    columns = cache.add(keys, ids, np.zeros((len(keys), 2), dtype=np.int32))
    left = columns[:busy_until]
    cache.leave(0, left, np.zeros(len(left), dtype=np.int64))
    assert len(cache.evict([len(left)])[0]) == len(left)
    return cache, columns


def test_columns_tell_which_pages_are_copies() -> None:
    """A later request fills what is gone of a column, and keeps what is there as a copy of its own."""
    cache, (column,) = one_page_each(["one"], 1)
    assert cache.add(["one"], np.array([[8, 9]]), np.zeros((1, 2))).tolist() == [-column]
    cache, (column,) = one_page_each(["one"], 1)
    assert cache.add(["one"], np.array([[8, 0]]), np.zeros((1, 2))).tolist() == [column]
    assert cache.add(["one"], np.array([[10, 11]]), np.zeros((1, 2))).tolist() == [0]


def test_no_end_of_pages_that_were_given_away() -> None:
    """The range at the boundary is known from earlier, and the request has left a page since that is gone now."""
    cache, columns = one_page_each(["one", "two"], 1)
    cache.keep(["one", "two"], columns, first=np.array([1, 0]))
    assert cache.find(["one", "two"]) is None


def test_what_was_computed_before_a_reset_is_not_found() -> None:
    pool = PagePool(num_blocks=9, streams=(2,), num_slots=2, num_chunks=3, max_chunks=1, cached_columns=8)
    slot, keys = pool.open(), ["one", "two", "three"]
    pool.reserve(slot, 2)
    pool.hand_out()
    pool.offer({slot: keys[:2]})
    pool.forget_prefixes()
    pool.reserve(slot, 1)
    pool.hand_out()
    pool.offer({slot: keys[2:]})
    pool.close(slot, keys)
    assert pool.prefixes is not None and pool.prefixes.find(keys) is None
    assert pool.used_total == 0
