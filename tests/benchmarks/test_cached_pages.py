"""The picture of a conversation's pages: a small run on a real engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.record import saved
from tests.support import ROOT

PAGE, STREAMS = 64, 32
SYSTEM, USER, ANSWER = 256, 192, 8


def test_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import cached_pages

    file, picture = tmp_path / "pages.json", tmp_path / "pages.png"
    argv = ["cached_pages", f"--model={ROOT / 'examples' / 'fox-tiny'}", "--turns=3", "--crowded=1"]
    argv += [f"--system={SYSTEM}", f"--user={USER}", f"--answer={ANSWER}", f"--json={file}", f"--out={picture}"]
    monkeypatch.setattr(sys, "argv", argv)
    cached_pages.main()
    figures = saved(file)
    steps, turns = figures["steps"], figures["turns"]
    assert [(one["conversation"], one["turn"]) for one in turns] == [(1, 1), (1, 2), (2, 1), (1, 3)]
    assert picture.stat().st_size > 0
    assert "conversation 2, turn 1: 0 of 448 tokens found" in capsys.readouterr().out

    for one in turns:
        before = SYSTEM + (one["turn"] - 1) * (USER + ANSWER)
        assert one["prompt_tokens"] == before + USER
        # Whole pages of what the last turn has left. The last token of an answer is never computed.
        assert one["cached_tokens"] == ((before - 1) // PAGE * PAGE if one["turn"] > 1 else 0)
    # The turns follow each other without a gap, and the pages that there are hold the longest of them.
    assert [one["begin"] for one in turns] == [0, *(one["end"] for one in turns[:-1])]
    assert figures["pages"] == -(-(SYSTEM + 3 * (USER + ANSWER)) // PAGE) * STREAMS

    assert {len(values) for values in steps.values()} == {turns[-1]["end"]}
    for live, cached, dense in zip(steps["live"], steps["cached"], steps["dense"], strict=True):
        assert live + cached <= min(figures["pages"], dense)
    assert all(steps["live"][one["end"] - 1] == 0 for one in turns)
    # A request's pages: all its tokens but the last, which is never computed.
    lengths = [one["prompt_tokens"] + ANSWER - 1 for one in turns]
    pages = [-(-length // PAGE) * STREAMS for length in lengths]
    ends = [steps["dense"][one["end"] - 1] for one in turns]
    assert ends == [pages[0], pages[1], pages[1] + pages[2], pages[3] + pages[2]]
    given_away = steps["given away"]
    assert given_away == sorted(given_away) and given_away[turns[1]["end"] - 1] == 0 < given_away[-1]
