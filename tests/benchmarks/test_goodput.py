"""Traffic of conversations, and which answers are in time."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import mean, median

import pytest

from benchmarks import goodput, record
from benchmarks.goodput import Lengths, Request, conversation, most, of_trace


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
        ([0.9], True),
        ([1.1], False),
        ([1.1, 1.11], False),
        ([0.9, 0.94, 1.0], True),  # 50 ms on average
        ([0.9, 0.94, 1.01], False),
    ],
)
def test_in_time(came: list[float], in_time: bool) -> None:
    assert Request(0.0, Lengths(1, 3), [1], came).in_time(1.0, 0.0501) is in_time


def row(rate: float, in_time: float) -> dict[str, object]:
    times = {"50": 10.0, "90": 20.0, "99": None}
    return {
        "rate": rate, "in_time": in_time, "tokens_per_second": 1.0, "first_ms": times, "each_ms": times
    }  # fmt: skip


def test_the_highest_rate_is_below_the_first_that_fails() -> None:
    assert most([row(2, 1.0), row(4, 0.9), row(6, 0.8), row(8, 0.95)], 0.9) == 4
    assert most([row(2, 0.5)], 0.9) == 0


def test_the_report_compares_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")}
    options |= {"executor": None, "kv_cache_dtype": "auto", "first_ms": 1000, "each_ms": 50}
    for system, rates in (("dense", (2, 4)), ("fox", (2, 4, 6))):
        rows = [row(rate, 1.0) for rate in rates]
        record.save(tmp_path / f"{system}.json", {"system": system, "options": options, "rows": rows})
    files = [str(tmp_path / f"{system}.json") for system in ("dense", "fox")]
    monkeypatch.setattr("sys.argv", ["goodput", "report", *files])
    goodput.main()
    said = capsys.readouterr().out
    assert "fox: 6 requests a second with 90 % in time (1.50x)" in said
    assert "p99 never" in said


def test_quantiles() -> None:
    values = [float(n) for n in range(100)]
    assert [goodput._quantile(values, q) for q in (50, 90, 99)] == [50, 90, 99]
    assert goodput._quantile([1.0, math.inf], 99) is None
    assert goodput._quantile([], 50) is None
