"""What a step reserves and whose live ranges it looks at: vLLM's own block pool, and a scheduler's calls without an
engine."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.scheduler_cost import PAGE, Prompt, ask, fox_manager
from vllm_fox.kernels.forgetting.pages import LIVE_RANGE_PERIOD
from vllm_fox.pages.manager import FEW_REQUESTS, REPORT_EVERY, StreamPageManager


def start(requests: int, num_blocks: int) -> tuple[StreamPageManager, dict[str, int]]:
    """A manager whose requests have read prompts of different lengths, and their lengths."""
    manager = fox_manager(num_blocks)
    lengths = {f"request-{n}": 20 + n for n in range(requests)}
    for name, length in lengths.items():
        ask(manager, name, length)
    # A step with prompts looks at all of them.
    assert len(manager.take_update(lengths).slots) == requests
    return manager, lengths


def decode(manager: StreamPageManager, lengths: dict[str, int]) -> tuple[list[int], set[int]]:
    """One step: the slots that it looks at, and those whose live range a worker has moved in it."""
    for name in lengths:
        lengths[name] += 1
        ask(manager, name, lengths[name])
    moved = {manager._slot_of[name] for name, length in lengths.items() if length % LIVE_RANGE_PERIOD == 0}
    return manager.take_update(dict.fromkeys(lengths, 1)).slots.tolist(), moved


def test_many_requests_are_looked_at_together() -> None:
    """Every fourth step, whoever's live range has moved since; nobody is left out, nobody twice."""
    manager, lengths = start(2 * FEW_REQUESTS, 1000)
    waiting: set[int] = set()
    for step in range(1, 1 + 3 * LIVE_RANGE_PERIOD):
        found, moved = decode(manager, lengths)
        waiting |= moved
        assert len(set(found)) == len(found)
        assert set(found) == (waiting if step % REPORT_EVERY == 0 else set())
        if found:
            waiting.clear()


@pytest.mark.parametrize("requests, num_blocks", [(FEW_REQUESTS - 1, 1000), (FEW_REQUESTS, 30)])
def test_few_requests_or_short_of_blocks_at_once(requests: int, num_blocks: int) -> None:
    manager, lengths = start(requests, num_blocks)
    for _ in range(2 * LIVE_RANGE_PERIOD):
        found, moved = decode(manager, lengths)
        assert set(found) == moved


def test_prompts_are_looked_at_at_once() -> None:
    """With whoever is waiting: a step with a prompt is long, and much may come back."""
    manager, lengths = start(2 * FEW_REQUESTS, 1000)
    found, waiting = decode(manager, lengths)
    assert waiting and not found
    ask(manager, "late", 40)
    prompt = manager._slot_of["late"]
    assert set(manager.take_update({"late": 40}).slots.tolist()) == waiting | {prompt}


def test_who_has_ended_is_not_looked_at() -> None:
    manager, lengths = start(2 * FEW_REQUESTS, 1000)
    ended = manager._slot_of["request-11"]  # is due in the first step, which does not look
    found, moved = decode(manager, lengths)
    assert ended in moved and not found
    manager.pop_blocks_for_free("request-11")
    del lengths["request-11"]
    for _ in range(REPORT_EVERY - 1):
        found, _ = decode(manager, lengths)
    assert found and ended not in found


def admission(manager: StreamPageManager, name: str, pages: int) -> int:
    """Blocks that must be free for a prompt of ``pages``."""
    return manager.get_num_blocks_to_allocate(name, pages * PAGE, (), 0, 0, pages * PAGE, apply_admission_cap=True)


def test_what_is_reserved_counts_as_held() -> None:
    """Whether a step's pages have been handed out makes no difference to what the scheduler is told."""
    manager = fox_manager(1000)
    assert admission(manager, "early", 40) == 40
    ask(manager, "early", 30 * PAGE)
    # Its own, what the prompt under way has still to take, and a page for that.
    assert admission(manager, "late", 20) == 20 + 10 + 1
    assert manager.block_pool.get_num_free_blocks() == 999 - 30
    update = manager.take_update({"early": 30 * PAGE})
    assert update.opened.tolist() == [manager._slot_of["early"]] and len(update.columns.ids) == 30
    assert admission(manager, "late", 20) == 20 + 10 + 1
    assert manager.block_pool.get_num_free_blocks() == 999 - 30
    ask(manager, "early", 40 * PAGE)
    assert admission(manager, "late", 20) == 20 + 1
    update = manager.take_update({"early": 10 * PAGE})
    assert not update.opened.size and len(update.columns.ids) == 10
    assert admission(manager, "late", 20) == 20 + 1


def test_a_prompt_just_scheduled_is_expected_to_give_back() -> None:
    manager = fox_manager(1000)
    manager.live_share.observe(np.array([32]), np.array([0.1]))
    assert not manager.expects_release
    ask(manager, "prompt", 40 * PAGE)
    assert manager.expects_release
    manager.take_update({"prompt": 40 * PAGE})
    assert manager.expects_release


def test_who_is_preempted_in_a_step_gets_nothing_in_it() -> None:
    manager = fox_manager(1000)
    ask(manager, "stays", 3 * PAGE)
    ask(manager, "goes", 5 * PAGE)
    manager.pop_blocks_for_free("goes")
    update = manager.take_update({"stays": 3 * PAGE})
    assert update.opened.tolist() == [manager._slot_of["stays"]] and len(update.columns.ids) == 3
    assert manager.block_pool.get_num_free_blocks() == 999 - 3


def test_drafts_are_no_prompt() -> None:
    """A decode step with drafts looks at live ranges when tokens that are certain have passed a period."""
    drafts, found = 4, []
    manager = fox_manager(1000, unsettled=drafts)
    ask(manager, "a", 40)
    assert manager.take_update({"a": 40}).slots.size
    read = dict(manager.work.dense)
    for length in range(40, 40 + 3 * LIVE_RANGE_PERIOD):  # all drafts are rejected
        ask(manager, "a", length + 1 + drafts)
        if manager.take_update({"a": 1 + drafts}, {"a": [0] * drafts}).slots.size:
            found.append(length + 1)
    # Each period is passed within a step's tokens, whichever of these it keeps.
    assert {length // LIVE_RANGE_PERIOD for length in found} == {3, 4, 5}
    assert len(found) == 3 * (1 + drafts)
    assert manager.work.dense["prefill"] == read["prefill"]
    steps, pages = 3 * LIVE_RANGE_PERIOD, int(manager.pool.streams.sum())
    full = [-(-(length + 1 + drafts) // PAGE) for length in range(40, 40 + steps)]
    assert manager.work.dense["decode"] - read["decode"] == (1 + drafts) * pages * sum(np.maximum.accumulate(full))
    manager.pop_blocks_for_free("a")
    assert manager.pool.used_total == 0


def test_drafts_pass_no_boundary_of_a_cached_page() -> None:
    """A page is cached, and the live ranges at its end are asked for, once all of its tokens are certain."""
    drafts = 4
    manager = fox_manager(1000, caching=True, unsettled=drafts)
    cache, request = manager.pool.prefixes, Prompt("a", "text", 3 * PAGE)
    assert cache is not None

    def step(before: int, certain: int, drafted: int) -> tuple[list[int], int]:
        """Schedule tokens after the first ``before``: the boundaries looked at, and the pages cached."""
        length = before + certain + drafted
        ask(manager, "a", length)
        manager.cache_blocks(request, before + certain, replay_boundaries=())  # type: ignore[arg-type]
        update = manager.take_update({"a": certain + drafted}, {"a": [0] * drafted} if drafted else {})
        assert not update.slots.size and update.boundary_slots.size == update.boundary_pages.size
        return update.boundary_pages.tolist(), len(cache)

    assert step(0, PAGE - 4, 0) == ([], 0)
    assert step(PAGE - 4, 1, drafts) == ([], 0)  # the last draft opens a page
    assert manager.pool.num_pages[manager._slot_of["a"]] == 2
    assert step(PAGE - 3, 1, drafts) == ([], 0)  # all were rejected; now all but one are right
    assert step(PAGE + 1, 1, drafts) == ([1], 1)
    assert step(PAGE + 2, 1, drafts) == ([], 1)
    assert step(PAGE + 3, PAGE, 0) == ([2], 2)  # a prompt that goes on
