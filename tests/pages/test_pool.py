"""The page pool as a state machine: in whatever order it is called, no page is owned twice and none is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_fox.kernels.paged import TABLE_CHUNK
from vllm_fox.pages.pool import OutOfPages, PagePool

BLOCKS, STREAMS = 41, (3, 2)  # the ranks of pipeline stages with three and two layers
RANKS = len(STREAMS)


def make_pool() -> PagePool:
    return PagePool(num_blocks=BLOCKS, streams=STREAMS, num_slots=4, num_chunks=5, max_chunks=4)


def starts_of(page: int, rank: int) -> np.ndarray:
    """A report on one slot: all streams of a rank begin to live at ``page``."""
    return np.full((1, STREAMS[rank]), page)


class PoolMachine(RuleBasedStateMachine):
    """Reserve, hand out, report (in time, late, repeated, of an earlier life), finish and preempt in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.open: dict[int, list[np.ndarray]] = {}  # slot -> our own copy of each rank's starts
        self.mail: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # reports under way
        self.pages: dict[int, list[np.ndarray]] = {}  # slot -> ids [streams] of each page index
        self.promised: dict[int, int] = {}
        # The page table as a worker has it.
        self.chunk_of = np.zeros((5, 4), dtype=int)
        self.entries = np.zeros((5, TABLE_CHUNK, sum(STREAMS)), dtype=int)
        # Pages that a worker has filled with NaN since they were last handed out.
        self.pool.watch_freed()
        self.poisoned = [set(self.pool.free_ids(rank).tolist()) for rank in range(RANKS)]

    @rule(count=st.integers(1, 20))
    @precondition(lambda self: self.pool.has_free_slot)
    def begin(self, count: int) -> None:
        if not self._fits(0, count):
            return
        slot = self.pool.open()
        assert slot not in self.open and slot != 0
        self.open[slot] = [np.zeros(count, dtype=np.int64) for count in STREAMS]
        self.pages[slot] = []
        self._reserve(slot, count)

    @rule(data=st.data(), count=st.integers(1, 9))
    @precondition(lambda self: self.open)
    def grow(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open)))
        if len(self.pages[slot]) + self.promised.get(slot, 0) + count > 4 * TABLE_CHUNK:
            return
        if not self._fits(slot, count):
            with pytest.raises(OutOfPages):
                self.pool.reserve(slot, count)
            return
        self._reserve(slot, count)

    def _fits(self, slot: int, count: int) -> bool:
        blocks = min(len(self.pool.free_ids(rank)) // STREAMS[rank] for rank in range(RANKS))
        return sum(self.promised.values()) + count <= blocks and self.pool.chunks_available(slot, count)

    def _reserve(self, slot: int, count: int) -> None:
        self.pool.reserve(slot, count)
        self.promised[slot] = self.promised.get(slot, 0) + count
        assert self.pool.reserved(slot) == self.promised[slot]

    @rule()
    def hand_out(self) -> None:
        columns = self.pool.hand_out()
        assert columns.ids.shape == (sum(self.promised.values()), sum(STREAMS))
        self.chunk_of[columns.new_chunk_slot, columns.new_chunk_index] = columns.new_chunk
        self.entries[columns.chunk, columns.offset] = columns.ids
        ids = iter(columns.ids)
        for slot, count in self.promised.items():
            self.pages[slot] += itertools.islice(ids, count)
        self.promised.clear()
        for rank, freed in enumerate(self.pool.take_freed()):
            # They are freed before they are handed out again.
            self.poisoned[rank] |= set(freed.tolist())
            self.poisoned[rank] -= set(columns.ids[:, self.pool.columns[rank]].ravel().tolist())
            assert self.poisoned[rank] == set(self.pool.free_ids(rank).tolist())

    @rule(data=st.data(), rank=st.integers(0, RANKS - 1))
    @precondition(lambda self: self.open)
    def report(self, data: st.DataObject, rank: int) -> None:
        """A worker looks at the live ranges of some slots; the scheduler will hear of it later."""
        slots = data.draw(st.lists(st.sampled_from(sorted(self.open)), min_size=1, unique=True))
        starts = [
            [data.draw(st.integers(0, max(len(self.pages[slot]) - 1, 0))) for _ in range(STREAMS[rank])]
            for slot in slots
        ]
        slots_array = np.array(slots)
        self.mail.append((rank, slots_array, self.pool.epoch[slots_array].copy(), np.array(starts)))

    @rule(data=st.data(), keep=st.booleans())
    @precondition(lambda self: self.mail)
    def deliver(self, data: st.DataObject, keep: bool) -> None:
        """Out of order, perhaps twice, perhaps for a request that has ended or lives again."""
        which = data.draw(st.integers(0, len(self.mail) - 1))
        rank, slots, epochs, starts = self.mail[which] if keep else self.mail.pop(which)
        before = self.pool.used_total
        expected = 0
        for slot, epoch, start in zip(slots.tolist(), epochs.tolist(), starts):
            if slot in self.open and self.pool.epoch[slot] == epoch:
                moved = np.maximum(self.open[slot][rank], start)
                expected += int((moved - self.open[slot][rank]).sum())
                self.open[slot][rank] = moved
        assert self.pool.release(rank, slots, epochs, starts) == expected
        assert self.pool.used_total == before - expected

    @rule(data=st.data())
    @precondition(lambda self: self.open)
    def end(self, data: st.DataObject) -> None:
        """The request finishes, is aborted or preempted: to the pool it is the same."""
        slot = data.draw(st.sampled_from(sorted(self.open)))
        self.pool.close(slot)
        del self.open[slot], self.pages[slot]
        self.promised.pop(slot, None)

    @invariant()
    def every_page_has_one_owner(self) -> None:
        for rank in range(RANKS):
            owned = [self.pool.free_ids(rank)]
            for slot, starts in self.open.items():
                held = self.pool.held_ids(slot, rank)
                mine = [
                    page[self.pool.columns[rank]][stream]
                    for stream in range(STREAMS[rank])
                    for page in self.pages[slot][starts[rank][stream] :]
                ]
                assert sorted(held.tolist()) == sorted(mine)
                assert int(self.pool.live_pages[slot, rank]) == len(mine)
                owned.append(held)
            everything = np.sort(np.concatenate(owned))
            assert np.array_equal(everything, np.arange(STREAMS[rank], BLOCKS * STREAMS[rank]))

    @invariant()
    def a_worker_finds_every_live_page(self) -> None:
        for slot, starts in self.open.items():
            first = np.concatenate(starts)
            for page, ids in enumerate(self.pages[slot]):
                found = self.entries[self.chunk_of[slot, page // TABLE_CHUNK], page % TABLE_CHUNK]
                assert (found == ids)[page >= first].all()

    @invariant()
    def counts_are_true(self) -> None:
        used = [(BLOCKS - 1) * STREAMS[rank] - len(self.pool.free_ids(rank)) for rank in range(RANKS)]
        blocks = max(-(-pages // count) for pages, count in zip(used, STREAMS))
        assert self.pool.used_blocks == blocks + sum(self.promised.values())
        assert self.pool.used_total == sum(used)
        if not self.open:
            assert self.pool.used_blocks == 0 and not self.pool.live_pages.any()
            assert len(self.pool._free_chunks) == 4 and len(self.pool._free_slots) == 4
            assert self.pool.chunks_available(0, 4 * TABLE_CHUNK)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def give(pool: PagePool, slot: int, count: int) -> None:
    pool.reserve(slot, count)
    pool.hand_out()


def test_old_life_cannot_free_pages_of_the_new_one() -> None:
    pool = make_pool()
    slot = pool.open()
    give(pool, slot, 8)
    late = (0, np.array([slot]), pool.epoch[[slot]].copy(), starts_of(7, 0))
    pool.close(slot)
    assert pool.open() == slot  # preempted and resumed in the same slot
    give(pool, slot, 8)
    assert pool.release(*late) == 0
    assert pool.used_total == 8 * sum(STREAMS)
    assert pool.release(0, np.array([slot]), pool.epoch[[slot]], late[3]) == 7 * STREAMS[0]


def test_newest_page_is_never_freed() -> None:
    pool = make_pool()
    slot = pool.open()
    give(pool, slot, 3)
    pool.release(0, np.array([slot]), pool.epoch[[slot]], starts_of(99, 0))
    assert len(pool.held_ids(slot, 0)) == STREAMS[0]


def test_table_chunks_come_back_while_the_request_runs() -> None:
    """A request can run for ever on two table chunks, if it forgets."""
    pool = PagePool(num_blocks=BLOCKS, streams=STREAMS[:1], num_slots=1, num_chunks=4, max_chunks=100)
    slot = pool.open()
    for page in range(1000):
        give(pool, slot, 1)
        pool.release(0, np.array([slot]), pool.epoch[[slot]], starts_of(page - 3, 0))
    assert pool.used_total == 4 * STREAMS[0]
