"""The soak run without its server: what arrives, how answers are compared, and what makes it fail."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks import soak
from benchmarks.soak_load import (
    ANSWER,
    BOUND,
    MIX,
    TURNS,
    USER_TOKENS,
    Answer,
    Outcome,
    Reservoir,
    arrivals,
    difference,
    kind_of_error,
)
from benchmarks.soak_verdict import by_kind, errors_of, failures, slope

CONTEXT = 2048
IDLE = {"requests_running": 0, "requests_waiting": 0, "pages_live": 0, "kv_usage": 0.0, "pages_cached": 7}
GOOD: dict[str, Any] = {
    "requests": 10,
    "errors": {},
    "wrong": {},
    "idle": {"after the load": IDLE, "at the end": IDLE},
    "compared": {"answers": 3, "other_tokens": 0, "largest": 1e-6, "wrong": []},
    "memory_growth_mib": 3.0,
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
    "growing memory": ({"memory_growth_mib": 80.0}, "Memory has grown by 80 MiB"),
    "too few samples": ({"memory_growth_mib": None}, "too few samples"),
}


def test_arrivals_are_a_poisson_process_of_the_mix() -> None:
    found = list(arrivals(1, rate=2.0, seconds=10000, context=CONTEXT))
    assert found == list(arrivals(1, rate=2.0, seconds=10000, context=CONTEXT))
    assert found[:9] != list(arrivals(2, rate=2.0, seconds=10000, context=CONTEXT))[:9]
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
    assert all(
        one.prompt >= 1 and 1 <= one.answer <= ANSWER and one.prompt + one.answer <= context for one in found
    )
    greedy = [one for one in found if one.kind == "greedy"]
    assert min(one.prompt for one in greedy) == 1
    assert max(one.prompt + one.answer for one in greedy) > 0.95 * context
    chats = [one for one in found if one.kind == "chat"]
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


def test_memory_is_that_of_the_second_half() -> None:
    # It grows fast while it warms up, and by 36 MiB an hour then.
    samples = [{"at": at, "memory_mib": 500 + 10 * min(at, 50) + 0.01 * max(0, at - 50)} for at in range(101)]
    trend = slope(samples)
    assert trend is not None and trend[0] == pytest.approx(36) and trend[1] == pytest.approx(0.5)
    assert slope(samples[:4]) is None and slope([]) is None


def test_outcomes_are_counted() -> None:
    request = httpx.Request("POST", "http://localhost")
    gone = openai.APIConnectionError(request=request)
    failed = openai.InternalServerError("", response=httpx.Response(503, request=request), body=None)
    late = openai.APIError("", request, body={"code": 500})
    assert [kind_of_error(one) for one in (gone, failed, late)] == ["APIConnectionError", "503", "500"]
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
    assert failures(GOOD, most_growth=64) == []


@pytest.mark.parametrize("what", BAD)
def test_each_failure_ends_the_command_with_1(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    change, sentence = BAD[what]
    found = failures(GOOD | change, most_growth=64)
    assert len(found) == 1 and sentence in found[0]
    monkeypatch.setattr(sys, "argv", ["soak", str(tmp_path), "--minutes=1"])
    monkeypatch.setattr(soak, "run", lambda _: found)
    with pytest.raises(SystemExit) as ended:
        soak.main()
    # Python's exit code of a message is 1.
    assert ended.value.code == "verdict: FAILED" and sentence in capsys.readouterr().out
    monkeypatch.setattr(soak, "run", lambda _: [])
    soak.main()
    assert capsys.readouterr().out.startswith("verdict:")
