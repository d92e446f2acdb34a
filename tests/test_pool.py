"""The page pool as a state machine: in whatever order it is called, no page is owned twice and none is lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_fox.pages.pool import OutOfPages, PagePool

BLOCKS, STREAMS = 41, (3, 2)  # the ranks of pipeline stages with three and two layers
RANKS = len(STREAMS)


def make_pool() -> PagePool:
    return PagePool(num_blocks=BLOCKS, streams=STREAMS, num_slots=4, num_chunks=12, max_chunks=4)


def starts_of(page: int, rank: int) -> np.ndarray:
    """A report on one slot: all streams of a rank begin to live at ``page``."""
    return np.full((1, STREAMS[rank]), page)


class PoolMachine(RuleBasedStateMachine):
    """Allocate, report (in time, late, repeated, of an earlier life), finish and preempt in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.open: dict[int, list[np.ndarray]] = {}  # slot -> our own copy of each rank's starts
        self.mail: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # reports under way
        self.pages: dict[int, list[np.ndarray]] = {}  # slot -> ids [streams] of each page index

    @rule(count=st.integers(1, 20))
    @precondition(lambda self: self.pool.has_free_slot)
    def begin(self, count: int) -> None:
        if not self.pool.can_extend(0, count):
            return
        slot = self.pool.open()
        assert slot not in self.open and slot != 0
        self.open[slot] = [np.zeros(count, dtype=np.int64) for count in STREAMS]
        self.pages[slot] = []
        self._grow(slot, count)

    @rule(data=st.data(), count=st.integers(1, 9))
    @precondition(lambda self: self.open)
    def grow(self, data: st.DataObject, count: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.open)))
        if len(self.pages[slot]) + count > 4 * 16:
            return
        if not self.pool.can_extend(slot, count):
            with pytest.raises(OutOfPages):
                self.pool.extend(slot, count)
            return
        self._grow(slot, count)

    def _grow(self, slot: int, count: int) -> None:
        columns = self.pool.extend(slot, count)
        assert columns.ids.shape == (count, sum(STREAMS))
        self.pages[slot] += list(columns.ids)

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
    def counts_are_true(self) -> None:
        used = [(BLOCKS - 1) * STREAMS[rank] - len(self.pool.free_ids(rank)) for rank in range(RANKS)]
        assert self.pool.used_blocks == max(-(-pages // count) for pages, count in zip(used, STREAMS))
        assert self.pool.used_total == sum(used)
        if not self.open:
            assert self.pool.used_blocks == 0 and not self.pool.live_pages.any()
            assert len(self.pool._free_chunks) == 11 and len(self.pool._free_slots) == 4


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_old_life_cannot_free_pages_of_the_new_one() -> None:
    pool = make_pool()
    slot = pool.open()
    pool.extend(slot, 8)
    late = (0, np.array([slot]), pool.epoch[[slot]].copy(), starts_of(7, 0))
    pool.close(slot)
    assert pool.open() == slot  # preempted and resumed in the same slot
    pool.extend(slot, 8)
    assert pool.release(*late) == 0
    assert pool.used_total == 8 * sum(STREAMS)
    assert pool.release(0, np.array([slot]), pool.epoch[[slot]], late[3]) == 7 * STREAMS[0]


def test_newest_page_is_never_freed() -> None:
    pool = make_pool()
    slot = pool.open()
    pool.extend(slot, 3)
    pool.release(0, np.array([slot]), pool.epoch[[slot]], starts_of(99, 0))
    assert len(pool.held_ids(slot, 0)) == STREAMS[0]


def test_table_chunks_come_back_while_the_request_runs() -> None:
    """A request can run for ever on two table chunks, if it forgets."""
    pool = PagePool(num_blocks=BLOCKS, streams=STREAMS[:1], num_slots=1, num_chunks=4, max_chunks=100)
    slot = pool.open()
    for page in range(1000):
        pool.extend(slot, 1)
        pool.release(0, np.array([slot]), pool.epoch[[slot]], starts_of(page - 3, 0))
    assert pool.used_total == 4 * STREAMS[0]
