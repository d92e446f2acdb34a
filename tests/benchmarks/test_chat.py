"""The benchmark of chat: its arithmetic by hand, and a small run on real engines."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chat
from benchmarks.record import saved

PAGE = 64


# Arithmetic.


def test_an_unlimited_cache_finds_full_blocks() -> None:
    shared = list(range(100, 140))
    first, second = shared + [1] * 10, shared + [2] * 10
    more = first + [7] * 6 + [8] * 20
    # 40 tokens are shared, of which two blocks are full. Prompt and answer are 56 tokens, of which the last is
    # never computed, so three blocks of the conversation are found.
    hits = chat.unlimited_hits([(first, [7] * 6), (second, [9]), (more, [9])])
    assert hits == [0, 32, 48]


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    prompt = list(range(32))
    assert chat.unlimited_hits([(prompt, [1]), (prompt, [1]), (prompt + [5], [1])]) == [0, 16, 32]


def test_equal_blocks_after_unequal_ones_are_no_hit() -> None:
    same = [3] * 16
    assert chat.unlimited_hits([([1] * 16 + same, [0]), ([2] * 16 + same + [4], [0])]) == [0, 0]


@pytest.mark.parametrize("start", [1, 5, 13, 14, 40, 1000])
@pytest.mark.parametrize("limit", [0, 1, 2, 13, 63, 64])
def test_search_for_the_largest(start: int, limit: int) -> None:
    tried: list[int] = []

    async def holds(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert asyncio.run(chat.largest(holds, start, most=64)) == limit
    assert len(tried) == len(set(tried)) and max(tried) <= 64


def test_a_coarse_search_ends_sooner() -> None:
    tried: list[int] = []

    async def holds(number: int) -> bool:
        tried.append(number)
        return number <= 100

    assert asyncio.run(chat.largest(holds, 32, most=256, precision=0.1)) == 96
    assert tried == [32, 64, 128, 96, 112, 104]


def test_figures_of_a_turn() -> None:
    turns = [chat.Turn(c, 1, [c] * 32 + [9], [1, 2], first=0.001 * (c + 1), cached=16 * c) for c in range(3)]
    turns.append(chat.Turn(0, 2, [0] * 32 + [9, 1, 2, 3], [4], first=0.5, cached=32))
    first, second = chat.by_turn(turns)
    assert first["turn"] == 1 and first["all_ms"] == pytest.approx([1, 2, 3])
    assert (first["prompt_tokens"], first["cached_tokens"], first["unlimited_tokens"]) == (99, 48, 0)
    assert (second["prompt_tokens"], second["cached_tokens"], second["unlimited_tokens"]) == (36, 32, 32)
    slower = [first | {"all_ms": [4.0, 5.0]}, second]
    both = chat.together("turns", [{"seconds": 1.0, "rows": [first, second]}, {"seconds": 2.0, "rows": slower}])
    one, other = both["rows"]
    assert one["all_ms"] == pytest.approx([1, 2, 3, 4, 5]) and one["median_ms"] == pytest.approx(3.0)
    assert one["p99_ms"] == pytest.approx(4.96) and other["median_ms"] == pytest.approx(500)
    assert both["seconds"] == [1.0, 2.0] and both["hit_share"] == pytest.approx(160 / 64)
    assert (one["prompt_tokens"], one["cached_tokens"], one["unlimited_tokens"]) == (198, 96, 0)


def figures_of(turns: list[float], rate: float, kept: int) -> dict[str, Any]:
    rows = [
        {"turn": number, "median_ms": ms, "p99_ms": 2 * ms, "cached_tokens": 96, "unlimited_tokens": 100}
        for number, ms in enumerate(turns, 1)
    ]
    return {
        "turns": {"rows": rows},
        "throughput": {"output_tokens_per_second": rate},
        "documents": {"first_ms": 60.0, "second_ms": 20.0},
        "kept": {"conversations": kept},
        "unshared": {"output_tokens_per_second": rate},
    }


def test_targets() -> None:
    systems = {
        "fox": figures_of([2.0, 1.0, 1.0, 1.0], 130.0, 8),
        "fox-off": figures_of([3.0, 3.0, 3.0, 3.0], 132.0, 0),
        "dense": figures_of([1.0, 1.0, 1.0, 1.0], 100.0, 2),
    }
    found = [(one.ratio, one.met) for one in chat.targets(systems)]
    # As fast as dense is enough up to the third turn only, and a third of the time is not less than a third.
    turns = [(2.0, False), (1.0, True), (1.0, True), (1.0, False)]
    expected = [one for one in turns for _ in ("median", "99th percentile")]
    expected += [(0.96, True), (1.3, True), (1 / 3, False), (4.0, True), (130 / 132, True)]
    assert [met for _, met in found] == [met for _, met in expected]
    assert [ratio for ratio, _ in found] == pytest.approx([ratio for ratio, _ in expected])
    assert not chat.targets({"dense": systems["dense"]})


def test_targets_of_host_memory() -> None:
    rate = "output_tokens_per_second"
    systems = {
        "fox": {"returning": {"hit_rate": 0.1}, "unshared": {rate: 100.0}},
        "fox-host": {"returning": {"hit_rate": 0.4}, "unshared": {rate: 96.0}},
    }
    found = [(one.ratio, one.met) for one in chat.targets(systems)]
    assert found == [(pytest.approx(4.0), True), (pytest.approx(0.96), False)]


# Real engines.


def test_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "chat.json", tmp_path / "chat.png"
    argv = ["chat", "--tiny", "--systems", "fox", "--parts", "turns", "documents"]
    argv += [f"--models={tmp_path}", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", argv)
    chat.main()
    figures = saved(file)
    tiny, systems = figures["options"], figures["systems"]
    assert set(systems) == {"fox"} and tiny["conversations"] == 4
    found = systems["fox"]
    assert set(found) == {"turns", "documents"}
    rows = found["turns"]["rows"]
    assert [row["turn"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert len(row["all_ms"]) == 4 and 0 < row["median_ms"] <= row["p99_ms"]
        before = 256 + (row["turn"] - 1) * (64 + 16)
        assert row["prompt_tokens"] == 4 * (before + 64)
        # What the last turn left, but for its last token; in the first turn, what the others share.
        full = (before - (row["turn"] > 1)) // PAGE * PAGE
        conversations = 4 if row["turn"] > 1 else 3
        assert row["cached_tokens"] == conversations * full
        assert row["unlimited_tokens"] == conversations * ((before - (row["turn"] > 1)) // 16 * 16)
    documents = found["documents"]
    assert documents["first_cached_tokens"] == [0, 0]
    assert documents["second_cached_tokens"] == [1024, 1024]
    assert documents["first_ms"] > 0 and documents["second_ms"] > 0
    assert found["turns"]["hit_share"] > 0.95
    assert [one["what"][:11] for one in figures["targets"]] == ["tokens hit,", "ms to the s"]

    # What was saved can be printed and drawn later.
    monkeypatch.setattr(sys, "argv", ["chat", "--report", str(file), "--plot", str(picture)])
    capsys.readouterr()
    chat.main()
    assert "fox, median" in capsys.readouterr().out and picture.stat().st_size > 0
