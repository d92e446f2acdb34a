"""Engines in processes of their own: they start side by side, answer jobs, and end with their block."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

from benchmarks.engine_process import engine_processes


def echo(name: str, pipe: Connection, greeting: str) -> None:
    if greeting == "dies":
        return
    pipe.send(None)
    if greeting == "dies later":
        return
    while (job := pipe.recv()) is not None:
        pipe.send({"said": [greeting, name, *job], "method": os.environ["VLLM_WORKER_MULTIPROC_METHOD"]})


def test_engines_answer_in_turn_and_end_with_the_block() -> None:
    others = set(multiprocessing.active_children())
    started: list[int] = []

    def each() -> Iterator[tuple[str, str]]:
        for name in ("one", "two"):
            started.append(len(set(multiprocessing.active_children()) - others))
            yield name, "hello"

    with pytest.raises(ZeroDivisionError), engine_processes(echo, each()) as engines:
        assert started == [0, 1]
        for number in range(2):
            for engine in engines:
                assert engine.measure(number) == {"said": ["hello", engine.name, number], "method": "spawn"}
        raise ZeroDivisionError
    assert [engine.name for engine in engines] == ["one", "two"]
    assert set(multiprocessing.active_children()) <= others


def test_an_engine_that_does_not_start_ends_the_others() -> None:
    others = set(multiprocessing.active_children())
    with (
        pytest.raises(SystemExit, match="The engine of bad has ended"),
        engine_processes(echo, [("good", "hello"), ("bad", "dies")]),
    ):
        pytest.fail("they are not all there")
    assert set(multiprocessing.active_children()) <= others


def test_an_engine_that_dies_between_jobs_ends_the_others() -> None:
    others = set(multiprocessing.active_children())
    with engine_processes(echo, [("good", "hello"), ("bad", "dies later")]) as (good, bad):
        for _ in range(2):
            with pytest.raises(SystemExit, match="The engine of bad has ended"):
                bad.measure(1)
        assert good.measure(2)["said"] == ["hello", "good", 2]
    assert set(multiprocessing.active_children()) <= others
