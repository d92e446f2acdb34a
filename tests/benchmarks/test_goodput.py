"""Traffic of conversations, and which answers are in time."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks import goodput, record
from benchmarks.goodput import Lengths, Request, conversation, most, of_trace
from tests.support import patience


def test_lengths_are_those_of_conversations() -> None:
    """Median and mean are the published ones but for chance, and the longest prompts are cut off."""
    rng = random.Random(0)
    found = [conversation(rng, 10**9) for _ in range(100_000)]
    prompts, answers = zip(*found)
    middle, average = goodput.PROMPTS
    assert median(prompts) == pytest.approx(middle, rel=0.02)
    assert mean(prompts) == pytest.approx(average, rel=0.02)
    assert mean(answers) == pytest.approx(goodput.ANSWERS, rel=0.01)
    assert min(prompts) >= 1 and 1 <= min(answers) < max(answers) < 2 * goodput.ANSWERS
    assert max(sum(conversation(rng, 8192)) for _ in range(1000)) == 8192


def test_a_trace_gives_the_lengths_that_fit(tmp_path: Path) -> None:
    rows = [{"timestamp": 0, "input_length": n, "output_length": 10} for n in (50, 91, 90, 0)]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert of_trace(tmp_path / "trace.jsonl", 100) == [Lengths(50, 10), Lengths(90, 10)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "line 1 is no JSON object with input_length and output_length"),
        ('{"input_length": 5, "output_length": 5}\n[1]', "line 2 is no JSON object"),
        ('{"input_length": 5000, "output_length": 5}', "it has no request of at most 100 tokens (--max-model-len)"),
    ],
)
def test_another_file_is_refused(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(SystemExit) as refusal:
        of_trace(tmp_path / "trace.jsonl", 100)
    assert said in str(refusal.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("came", "in_time"),
    [
        ([], False),
        ([0.9, 0.91, 0.92], True),
        ([1.1, 1.11, 1.12], False),
        ([0.9, 0.94, 1.0], True),  # 50 ms on average
        ([0.9, 0.94, 1.01], False),
        ([0.9, 0.94], False),  # and nothing until the end, at 2
        ([0.9], False),
    ],
)
def test_in_time(came: list[float], in_time: bool) -> None:
    request = Request(7.0, Lengths(1, 3), came)
    assert request.in_time(1.0, 0.0501, until=9.0) is in_time


def options_of() -> argparse.Namespace:
    """Options of a run, as far as traffic depends on them."""
    given = {"seed": 0, "seconds": 2.0, "prompt": None, "output": 343, "max_model_len": 8192}
    given |= {"first_ms": 100.0, "each_ms": 20.0}
    return argparse.Namespace(**given)


def test_the_same_requests_arrive_first_at_every_rate() -> None:
    """A rate of five has those of a rate of one hundred, at twenty times as late."""
    args = options_of()
    few, many = (goodput.arrivals(args, [], rate) for rate in (5.0, 100.0))
    assert 0 < len(few) < 150 < len(many) < 250  # 10 and 200, but for chance
    for one, other in zip(few, many):
        assert one.lengths == other.lengths
        assert one.arrival == pytest.approx(20 * other.arrival)


class Slow:
    """An engine that needs 10 ms for a token, and 300 for the first one of the prompt with 99 tokens."""

    class model_config:
        @staticmethod
        def get_vocab_size() -> int:
            return 100

    async def generate(self, given: dict[str, list[int]], params: Any, name: str) -> AsyncIterator[Any]:
        for n in range(params.max_tokens):
            await asyncio.sleep(0.3 if n == 0 and len(given["prompt_token_ids"]) == 99 else 0.01)
            yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[n])])


def test_late_first_tokens_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "GIVE_UP_S", patience(100))
    requests = [Request(0.01 * n, Lengths(99 if n % 4 == 0 else 10, 5)) for n in range(8)]
    # However slow the machine is, 200 ms lie between a prompt that is late and one that is not.
    args = options_of()
    args.first_ms, args.each_ms = 250.0, 10_000.0
    found = asyncio.run(goodput.at_rate(cast(AsyncLLM, Slow()), args, requests))
    assert found["requests"] == 8 and found["unfinished"] == 0
    assert found["prompt_tokens"] == 2 * 99 + 6 * 10 and found["answer_tokens"] == 40
    assert all(len(one.came) == 5 for one in requests)
    late = [one for one in requests if one.came[0] > 0.25]
    assert {one.lengths.prompt for one in requests if one.came[0] >= 0.3} >= {99}
    assert found["in_time"] == 1 - len(late) / 8 <= 0.75


def row(rate: float, in_time: float) -> dict[str, object]:
    times = {"50": 10.0, "90": 20.0, "99": None}
    return {"rate": rate, "in_time": in_time, "tokens_per_second": 1.0, "first_ms": times, "each_ms": times}


def test_the_highest_rate_is_below_the_first_that_fails() -> None:
    assert most([row(2, 1.0), row(4, 0.9), row(6, 0.8), row(8, 0.95)], 0.9) == 4
    assert most([row(2, 0.5)], 0.9) == 0


def reported(
    monkeypatch: pytest.MonkeyPatch, folder: Path, runs: dict[str, tuple[str, list[float], dict[str, Any]]]
) -> None:
    """The report of files with a system, shares in time at 2, 4, 6, ... a second, and other options each."""
    for file, (system, shares, other) in runs.items():
        options = {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")} | {"executor": None}
        options |= vars(options_of()) | {"trace": None} | other
        rows = [row(2.0 * n, share) for n, share in enumerate(shares, 1)]
        record.save(folder / file, {"system": system, "options": options, "rows": rows})
    monkeypatch.setattr("sys.argv", ["goodput", "report", *(str(folder / file) for file in runs)])
    goodput.main()


def test_the_report_says_what_was_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, tuple[str, list[float], dict[str, Any]]] = {
        "a": ("dense", [0.7], {}),
        "b": ("fox", [1.0, 0.95, 0.8], {}),
        "c": ("fox", [1.0, 1.0], {"kv_cache_dtype": "fp8"}),
    }
    reported(monkeypatch, tmp_path, runs)
    said = capsys.readouterr().out
    assert "dense: fewer than 2 requests a second with 90 % in time" in said
    assert "fox: 4 requests a second" in said
    assert "fox fp8: at least 4 requests a second" in said
    assert "p99 never" in said


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, "is another run of fox: give one file of each"),
        ({"kv_cache_dtype": "fp8", "each_ms": 50.0}, "has --each-ms 50.0, and the first file has 20.0"),
        ({"kv_cache_dtype": "fp8", "trace": "t.jsonl"}, "has --trace t.jsonl, and the first file has None"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    other: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=said):
        reported(monkeypatch, tmp_path, {"a": ("fox", [1.0], {}), "b": ("fox", [1.0], other)})


def test_another_benchmarks_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.save(tmp_path / "a.json", {"rows": []})
    monkeypatch.setattr("sys.argv", ["goodput", "report", str(tmp_path / "a.json")])
    with pytest.raises(SystemExit, match="holds no run of"):
        goodput.main()


def test_quantiles() -> None:
    values = [float(n) for n in range(100)]
    assert [goodput._quantile(values, q) for q in (50, 90, 99)] == [50, 90, 99]
    assert goodput._quantile([1.0, math.inf], 99) is None
    assert goodput._quantile([], 50) is None
