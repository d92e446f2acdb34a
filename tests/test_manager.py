"""Which steps look at whose live ranges: vLLM's own block pool, and a scheduler's calls without an engine."""

from __future__ import annotations

import pytest

from benchmarks.scheduler_cost import ask, fox_manager
from vllm_fox.kernels.paged import LIVE_RANGE_PERIOD
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
