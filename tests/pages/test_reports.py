"""Reports that come late, out of order, twice or never: no live page is freed, and no dead page is lost."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from benchmarks.scheduler_cost import HEADS, LAYERS, PAGE, Prompt, fox_manager
from vllm_fox.pages.messages import PageReport

BLOCKS, MOST = 60, 24 * PAGE
WINDOWS = np.random.default_rng(0).integers(1, 6 * PAGE, LAYERS * HEADS)
"""Tokens that each stream remembers."""


def live_at(tokens: np.ndarray) -> np.ndarray:
    """First live pages [n, streams] of requests that have so many tokens."""
    return np.maximum((tokens[:, None] - WINDOWS) // PAGE, 0).astype(np.int32)


class MailMachine(RuleBasedStateMachine):
    """A scheduler whose worker's reports travel as they like."""

    caching: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.manager = fox_manager(BLOCKS, max_model_len=MOST, caching=self.caching)
        self.prompts: dict[str, Prompt] = {}
        self.length: dict[str, int] = {}
        self.scheduled: dict[str, int] = {}
        self.mail: list[PageReport] = []
        self.begun = 0

    def _fits(self, blocks: int) -> bool:
        return blocks <= self.manager.block_pool.get_num_free_blocks()

    @rule(text=st.integers(0, 2), pages=st.integers(1, 12), missing=st.integers(0, 2))
    @precondition(lambda self: len(self.length) < 5)
    def begin(self, text: int, pages: int, missing: int) -> None:
        """A prompt that ends a few tokens before a page does, so that steps of one token fill pages."""
        name, length, row, start = f"request-{self.begun}", PAGE * pages - missing, [], 0
        prompt = Prompt(name, f"text {text}", MOST)
        if self.caching:
            (row,), start = self.manager.find_longest_cache_hit(prompt.block_hashes, length - 1)
            if self.manager.must_wait(prompt, start):  # type: ignore[arg-type]
                return
        if not self._fits(self.manager.get_num_blocks_to_allocate(name, length, row, start, start, length)):
            return
        self.begun += 1
        self.manager.add_local_computed_blocks(name, row, start, 0)
        self.prompts[name] = prompt
        self._schedule(name, length, length - start)

    def _schedule(self, name: str, length: int, new: int) -> None:
        self.manager.allocate_new_blocks(name, length, length)
        if self.caching:
            self.manager.cache_blocks(self.prompts[name], length, replay_boundaries=())  # type: ignore[arg-type]
        self.length[name], self.scheduled[name] = length, new

    @rule(new=st.sampled_from([1, 1, 1, PAGE]))
    @precondition(lambda self: self.length)
    def step(self, new: int) -> None:
        """Every request gets as many tokens, if there is memory, and the worker sends its report."""
        for name in self.length.keys() - self.scheduled.keys():
            length = self.length[name] + new
            blocks = self.manager.get_num_blocks_to_allocate(name, length, (), length - new, length - new, length)
            if length <= MOST and self._fits(blocks):
                self._schedule(name, length, new)
        update = self.manager.take_update(self.scheduled)
        self.scheduled = {}
        tokens_of = {self.manager._slot_of[name]: length for name, length in self.length.items()}
        tokens = [tokens_of[slot] for slot in update.slots.tolist()] + (PAGE * update.boundary_pages).tolist()
        starts = torch.from_numpy(live_at(np.array(tokens, dtype=np.int64)))
        self.mail.append(PageReport(update.step, update.slots, update.epochs, 0, starts, None))

    @rule(data=st.data(), again=st.booleans())
    @precondition(lambda self: self.mail)
    def deliver(self, data: st.DataObject, again: bool) -> None:
        """Any report that is under way, once or twice. It makes up for all that were lost before it."""
        which = data.draw(st.integers(0, len(self.mail) - 1))
        report = self.mail[which] if again else self.mail.pop(which)
        self.manager.free_dead(report)
        pool = self.manager.pool
        for slot, epoch, first in zip(report.slots.tolist(), report.epochs.tolist(), report.starts[0]):
            if pool.epoch[slot] == epoch and pool.num_pages[slot]:
                assert (pool.start[slot] >= np.minimum(first, pool.num_pages[slot] - 1)).all()
        if again:
            before = pool.released_total, pool.start.copy(), pool.used_total
            self.manager.free_dead(report)
            assert (pool.released_total, pool.used_total) == (before[0], before[2])
            assert (pool.start == before[1]).all()

    @rule(data=st.data())
    @precondition(lambda self: self.mail)
    def lose(self, data: st.DataObject) -> None:
        self.mail.pop(data.draw(st.integers(0, len(self.mail) - 1)))

    @rule(data=st.data())
    @precondition(lambda self: self.length)
    def end(self, data: st.DataObject) -> None:
        """The request finishes, is aborted or preempted. Its reports are still under way, and its slot is free."""
        name = data.draw(st.sampled_from(sorted(self.length)))
        self.manager.pop_blocks_for_free(name)
        del self.length[name], self.prompts[name]
        self.scheduled.pop(name, None)

    @invariant()
    def no_live_page_is_free(self) -> None:
        for name, length in self.length.items():
            slot = self.manager._slot_of[name]
            assert (self.manager.pool.start[slot] <= live_at(np.array([length]))[0]).all()

    @invariant()
    def vllm_counts_along(self) -> None:
        held = BLOCKS - 1 - self.manager.block_pool.get_num_free_blocks()
        assert held == self.manager.pool.used_blocks == len(self.manager._held_blocks)

    def teardown(self) -> None:
        """When all requests have ended nothing is left, whatever became of their reports."""
        for name in self.length:
            self.manager.pop_blocks_for_free(name)
        for report in self.mail:
            self.manager.free_dead(report)
        self.length = {}
        self.vllm_counts_along()
        assert self.manager.pool.used_total == 0 and not self.manager.expects_release


class CachingMailMachine(MailMachine):
    """The same with prefix caching, where a report also says what is alive at the ends of cached pages."""

    caching = True


def test_a_report_of_prompts_and_answers_comes_after_a_later_one() -> None:
    """It has rows of both, and what belongs to the boundaries inside of prompts is no longer known then."""
    machine = CachingMailMachine()
    machine.begin(text=0, pages=9, missing=1)
    machine.step(1)
    machine.begin(text=1, pages=12, missing=0)
    machine.step(1)
    machine.step(1)
    _, both, later = machine.mail
    assert len(both.slots) == 1 and len(both.starts[0]) > 1
    for report in (later, both, both):
        machine.manager.free_dead(report)
        machine.no_live_page_is_free()
        machine.vllm_counts_along()
    answering = machine.manager._slot_of["request-0"]
    assert (machine.manager.pool.start[answering] == live_at(np.array([9 * PAGE]))[0]).all()
    machine.teardown()


TestMail = MailMachine.TestCase
TestMailWithCaching = CachingMailMachine.TestCase
TestMail.settings = TestMailWithCaching.settings = settings(max_examples=50, stateful_step_count=30)
