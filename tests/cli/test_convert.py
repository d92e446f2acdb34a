"""``vllm-fox convert`` is ``python -m vllm_fox.convert``: the same options, files and sentences."""

from __future__ import annotations

import argparse
import filecmp
import inspect
from pathlib import Path

import pytest

from tests.support.command_lines import options_of
from tests.support.evicting import THRESHOLD, VARIANTS, make_evicting
from vllm_fox.cli.convert import convert

from .conftest import Run


def test_options_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, argparse.Action] = dict(options_of("vllm_fox.convert", monkeypatch))
    assert [name.removeprefix("--") for name in options] == list(inspect.signature(convert).parameters)


def test_a_predictor_and_a_model_become_one(run: Run, tmp_path: Path) -> None:
    made = make_evicting(tmp_path, VARIANTS["qwen2-linear"])
    assert made.predictor is not None
    out = tmp_path / "out"
    words = ("--predictor", made.predictor, "--threshold", str(THRESHOLD), "--window", str(made.window))
    done = run("convert", made.published, out, *words)
    assert done.code == 0 and f"Serve it with: vllm serve {out}" in done.out
    names = sorted(path.name for path in made.served.iterdir())
    assert filecmp.cmpfiles(made.served, out, names, shallow=False) == (names, [], [])


def test_mistakes(run: Run, fox_tiny: Path, tmp_path: Path) -> None:
    for words, part in (
        ((fox_tiny, tmp_path / "out"), "model_type is 'forgetting_transformer-project_fox'"),
        ((fox_tiny, tmp_path), "exists: name a folder that does not"),
        ((tmp_path / "none", tmp_path / "out"), "config.json is missing"),
    ):
        done = run("convert", *words)
        assert done.code == 1 and part in done.err and done.err.count("\n") == 1 and not done.out
    assert not list(tmp_path.iterdir())
