"""The soak run without its server: what arrives, how answers are compared, and what makes it fail."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import numpy as np
import openai
import pytest

from benchmarks import soak
from benchmarks.soak_load import (
    ANSWER,
    BOUND,
    BURST,
    BURST_EVERY,
    BURST_PROMPT,
    MIX,
    TURNS,
    USER_TOKENS,
    Answer,
    Load,
    Outcome,
    Reservoir,
    arrivals,
    difference,
    kind_of_error,
)
from benchmarks.soak_verdict import IN_USE, by_kind, errors_of, failures, growth
from tests.support import ROOT, patience

CONTEXT = 2048
IDLE = {"requests_running": 0, "requests_waiting": 0, "pages_live": 0, "kv_usage": 0.0, "pages_cached": 7}
GOOD: dict[str, Any] = {
    "requests": 10,
    "errors": {},
    "wrong": {},
    "idle": {"after the load": IDLE, "at the end": IDLE},
    "compared": {"answers": 3, "other_tokens": 0, "largest": 1e-6, "wrong": []},
    "preemptions": 5,
    "growth": {"processes": {"server": [0.5, 0.1], "worker": [2.5, 0.6]}, "least": 2.0},
}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an error of the server": ({"errors": {"500": 2}}, "2 requests failed with 500."),
    "a lost connection": ({"errors": {"APIConnectionError": 1}}, "1 requests failed with APIConnectionError."),
    "a wrong form": ({"wrong": {"a structured answer is not of its form": 1}}, "not of its form: 1"),
    "no request": ({"requests": 0}, "No request was sent."),
    "a page": ({"idle": {"after the load": IDLE, "at the end": IDLE | {"pages_live": 1}}}, "not idle at the end"),
    "a running request": ({"idle": {"after the load": IDLE | {"requests_running": 1}}}, "'requests_running': 1"),
    "a waiting request": ({"idle": {"after the load": IDLE | {"requests_waiting": 1}}}, "'requests_waiting': 1"),
    "memory in use": ({"idle": {"after the load": IDLE | {"kv_usage": 0.1}}}, "'kv_usage': 0.1"),
    "nothing compared": ({"compared": GOOD["compared"] | {"answers": 0}}, "No greedy answer was compared."),
    "another answer": ({"compared": GOOD["compared"] | {"wrong": [{"difference": 0.5}]}}, "differs by 0.5 nats"),
    "no preemption": ({"preemptions": 0}, "No request was preempted"),
    "growing memory": (
        {"growth": {"processes": {"server": [0.5, 0.1], "worker": [2.5, 0.4]}, "least": 2.0}},
        "The memory of worker has grown by 2.5 ± 0.4 MiB",
    ),
    "too few samples": ({"growth": None}, "too few samples"),
}


def test_arrivals_are_a_poisson_process_of_the_mix() -> None:
    every = list(arrivals(1, rate=2.0, seconds=10000, context=CONTEXT))
    assert every == list(arrivals(1, rate=2.0, seconds=10000, context=CONTEXT))
    assert every[:9] != list(arrivals(2, rate=2.0, seconds=10000, context=CONTEXT))[:9]
    assert [one.at for one in every] == sorted(one.at for one in every)
    bursts = Counter(one.at for one in every if one.kind == "burst")
    assert set(bursts.values()) == {BURST} and min(bursts) == BURST_EVERY / 2
    assert len(bursts) == pytest.approx(10000 / BURST_EVERY, abs=1)
    found = [one for one in every if one.kind != "burst"]
    assert len(found) == pytest.approx(20000, rel=0.03)
    gaps = [after.at - before.at for before, after in zip(found, found[1:])]
    mean = sum(gaps) / len(gaps)
    # The standard deviation of an exponential distribution is its mean.
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    kinds = Counter(one.kind for one in found)
    assert kinds.keys() == MIX.keys() and sum(MIX.values()) == pytest.approx(1)
    for kind, share in MIX.items():
        assert kinds[kind] / len(found) == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize("context", [64, CONTEXT, 4096])
def test_lengths_go_from_one_token_to_what_the_context_leaves(context: int) -> None:
    found = list(arrivals(3, rate=1.0, seconds=20000, context=context))
    assert all(one.prompt >= 1 and one.answer >= 1 and one.prompt + one.answer <= context for one in found)
    assert all(one.answer <= ANSWER for one in found if one.kind != "burst")
    greedy = [one for one in found if one.kind == "greedy"]
    assert min(one.prompt for one in greedy) == 1
    assert max(one.prompt + one.answer for one in greedy) > 0.95 * context
    chats = [one for one in found if one.kind == "chat"]
    assert all(one.prompt <= BURST_PROMPT for one in found if one.kind == "burst")
    turn = min(USER_TOKENS, context // 16)
    assert all(one.prompt + TURNS * (turn + one.answer) <= context for one in chats)


def answer(*tokens: int, shift: float = 0.0) -> Answer:
    """An answer whose tokens 1 and 2 are as likely at each place, but for ``shift``, and 3 less so."""
    others = [{1: -0.7 + shift, 2: -0.7, 3: -3.0} for _ in tokens]
    return Answer([5], 4, [*tokens], [others[i][t] for i, t in enumerate(tokens)], others)


def test_a_difference_is_wrong_only_beyond_rounding() -> None:
    assert difference(answer(1, 2), answer(1, 2)) == (True, 0.0)
    same, worst = difference(answer(1, 2), answer(1, 2, shift=1e-5))
    assert same and 0 < worst < BOUND
    # Equal tokens do not hide that their likelihoods are not.
    same, worst = difference(answer(1, 2), answer(1, 2, shift=0.1))
    assert same and worst == pytest.approx(0.1)
    # A tie may go either way, and what comes after it is another text.
    same, worst = difference(answer(1, 1), answer(2, 3, shift=1e-5))
    assert not same and worst < BOUND
    same, worst = difference(answer(1), answer(2, shift=-0.5))
    assert not same and worst == pytest.approx(0.5)
    unknown = answer(1)
    del unknown.others[0][2]
    assert difference(unknown, answer(2)) == (False, float("inf"))
    assert difference(answer(1), answer(1, 2)) == (False, float("inf"))


def test_every_answer_is_as_likely_to_be_kept() -> None:
    kept = Counter[int]()
    for seed in range(400):
        some = Reservoir(5, seed)
        for number in range(50):
            some.add(Answer([number], 1))
        assert some.seen == 50 and len(some.kept) == 5
        kept.update(one.prompt[0] // 10 for one in some.kept)
    assert all(count == pytest.approx(400, rel=0.2) for count in kept.values()) and len(kept) == 5


def samples(**mib_per_s: float) -> list[dict[str, Any]]:
    """Of processes that grow fast while they warm up, and by so many MiB a second after half of the time."""
    return [
        {
            "at": at,
            "tokens": 2**17 * at,
            "processes_mib": {
                name: 500 + 10 * min(at, 50) + rate * max(0, at - 50) for name, rate in mib_per_s.items()
            },
        }
        for at in range(100)
    ]


def test_memory_is_that_of_the_last_third() -> None:
    found = growth(samples(server=0.0, worker=0.2))
    assert found is not None and found["processes"]["server"] == pytest.approx((0.0, 0.0), abs=1e-9)
    mib, error = found["processes"]["worker"]
    # The means of the first and the last part are seven eighths of the time apart.
    assert mib == pytest.approx(7 / 8 * 33 * 0.2, rel=0.05) and error < 0.3
    assert found["least"] == 33  # 2**17 tokens of 8 bytes a second
    assert growth(samples(server=0.0)[:60]) is None and growth([]) is None
    # Whoever ends or begins meanwhile has no trend.
    late = samples(server=0.0)
    late[-1]["processes_mib"]["late"] = 1.0
    found = growth(late)
    assert found is not None and found["processes"].keys() == {"server"}


def test_what_comes_and_goes_is_no_growth() -> None:
    """Of a thousand series without a trend, few are said to have one; of those with one, most."""
    rng = np.random.default_rng(0)

    def said(rate: float) -> float:
        count = 0
        for _ in range(500):
            some = samples(server=rate)
            for one, noise in zip(some, rng.normal(0, 2, len(some))):
                one["processes_mib"]["server"] += noise
            found = growth(some)
            assert found is not None
            mib, error = found["processes"]["server"]
            count += mib - error > 0
        return count / 500

    # One side of two standard errors with six degrees of freedom: 4.6 %.
    assert said(0.0) == pytest.approx(0.046, abs=0.03)
    assert said(0.2) > 0.95


def test_memory_is_not_judged_where_malloc_keeps_it() -> None:
    change, _ = BAD["growing memory"]
    assert failures(GOOD | change, judge_memory=False) == []
    change, sentence = BAD["a page"]
    (found,) = failures(GOOD | change, judge_memory=False)
    assert sentence in found


def test_what_cannot_be_written_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(soak, "run", lambda _: pytest.fail("it has started"))
    (tmp_path / "file").touch()
    for option, path in (("--json", tmp_path / "file" / "soak.json"), ("--plot", tmp_path)):
        monkeypatch.setattr(
            sys, "argv", ["soak", "M", "--minutes=1", f"--json={tmp_path}/s.json", f"{option}={path}"]
        )
        with pytest.raises(SystemExit) as ended:
            soak.main()
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"{option} is {path}, which cannot be written: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_outcomes_are_counted() -> None:
    request = httpx2.Request("POST", "http://localhost")
    gone = openai.APIConnectionError(request=request)
    gone.__cause__ = OSError("closed")
    failed = openai.InternalServerError("", response=httpx2.Response(503, request=request), body=None)
    late = openai.APIError("", request, body={"code": 500})
    assert [kind_of_error(one) for one in (gone, failed, late)] == [
        "APIConnectionError: OSError('closed')",
        "503",
        "500",
    ]
    outcomes = [
        Outcome("greedy", 1.0, 4.0, first=2.0),
        Outcome("greedy", 1.0, 2.0, error="503"),
        Outcome("aborted", 1.0, 2.0, first=1.5, cut=True),
    ]
    assert errors_of(outcomes) == {"503": 1}
    rows = by_kind(outcomes)
    assert rows["greedy"] | {"whole_s": None, "first_token_s": None} == {
        "requests": 2,
        "cut": 0,
        "errors": 1,
        "first_token_s": None,
        "whole_s": None,
    }
    assert rows["greedy"]["whole_s"]["p50"] == 3.0 and rows["greedy"]["first_token_s"]["p99"] == 1.0
    assert rows["aborted"]["cut"] == 1 and rows["aborted"]["whole_s"] is None


def test_nothing_is_wrong_with_a_good_run() -> None:
    assert failures(GOOD, judge_memory=True) == []


@pytest.mark.parametrize("what", BAD)
def test_each_failure_ends_the_command_with_1(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    change, sentence = BAD[what]
    found = failures(GOOD | change, judge_memory=True)
    assert len(found) == 1 and sentence in found[0]
    monkeypatch.setattr(sys, "argv", ["soak", str(tmp_path), "--minutes=1", f"--json={tmp_path}/s.json"])
    monkeypatch.setattr(soak, "run", lambda _: found)
    with pytest.raises(SystemExit) as ended:
        soak.main()
    # Python's exit code of a message is 1.
    assert ended.value.code == "verdict: FAILED" and sentence in capsys.readouterr().out
    monkeypatch.setattr(soak, "run", lambda _: [])
    soak.main()
    assert capsys.readouterr().out.startswith("verdict:")


class BusyServer:
    """Answers every other time, first that it works and then that nothing is in use."""

    url = "http://127.0.0.1:1"
    process = SimpleNamespace(pid=os.getpid())
    asked = 0

    def get(self, path: str) -> bytes:
        self.asked += 1
        if self.asked % 2:
            raise TimeoutError
        text = (ROOT / "tests" / "cli" / "metrics" / "fox-tiny-1.txt").read_text()
        return (text if self.asked == 2 else re.sub(r"(?m)^(vllm:[^ ]*) .*", r"\1 0.0", text)).encode()

    def check(self) -> None:
        """It has not ended."""


def test_a_server_that_is_busy_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "IDLE_S", patience(60))
    watch = soak.Watch(cast(Any, server := BusyServer()), cast(Load, SimpleNamespace(now=0.0, tokens=0)))
    state = asyncio.run(watch.idle())
    assert server.asked == 4 and not any(state[name] for name in IN_USE)


def test_a_load_that_is_stopped_sends_nothing_more() -> None:
    """It ends at once, and does not wait for the first request, which would come in an hour."""

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client:
            load = Load(client, "model", range(1000), CONTEXT, most=8, again=4, seed=0)
            late = (dataclasses.replace(one, at=one.at + 3600) for one in arrivals(0, 1.0, 60.0, CONTEXT))
            running = asyncio.create_task(load.run(late))
            await asyncio.sleep(0.05)
            load.stop()
            await asyncio.wait_for(running, patience(10))
            assert not load.outcomes and not load.not_sent

    asyncio.run(run())


def test_a_chat_that_is_stopped_has_no_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turn under way is finished."""
    asked = list[int]()

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0) as client:
            load = Load(client, "model", range(100_000), CONTEXT, most=8, again=4, seed=0)

            async def ask(prompt: list[int], most: int, outcome: Outcome, **options: Any) -> Answer:
                asked.append(len(prompt))
                load.stop()
                return Answer(prompt, most)

            monkeypatch.setattr(load, "ask", ask)
            chat = next(one for one in arrivals(0, 5.0, 60.0, CONTEXT) if one.kind == "chat")
            await load.run(iter([dataclasses.replace(chat, at=0.0)]))
            assert load.is_over and [one.error for one in load.outcomes] == [None]

    asyncio.run(run())
    assert len(asked) == 1
