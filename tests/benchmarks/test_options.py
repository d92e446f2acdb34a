"""Options of the benchmarks, and files that they saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record
from tests.support import ROOT
from tests.support.command_lines import check_ranges, refused, scripts

PRECISION = ["precision", "learning", "checkpoint", "text", "--output=o"]
SERVING = ["serving", "run", "--system=fox"]
GOODPUT = ["goodput", "run", "--system=fox"]


@pytest.mark.parametrize("script", scripts("benchmarks"))
def test_every_number_has_a_range(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if script in ("cached_pages", "dcp", "live_pages"):
        pytest.importorskip("matplotlib")
    assert check_ranges(f"benchmarks.{script}", monkeypatch)


def test_a_benchmark_finds_the_examples_by_itself() -> None:
    """The tests' own search path has them, and a user's has not."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    help_of = [sys.executable, "-m", "benchmarks.training", "--help"]
    shown = subprocess.run(help_of, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: training.py")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["capacity", "--utilization=2"], "--utilization is 2: it must be a number above 0 and at most 1."),
        (["capacity", "--reserve-gib=200"], "--reserve-gib is 200: it must be less than --utilization 0.9"),
        (["chat", "--heads=7"], "--hidden 1536 and --heads 7 do not go together"),
        (["chat", "--kept-tokens=131072"], "The longest request of kept has 131600 tokens"),
        (["chat", "--model=f"], "--model is f: it must be a folder with a FoX"),
        (["checkpoint", "fox", "f", "--heads=7"], "--hidden 1536 and --heads 7 do not go together"),
        (["cluster_sim", "scale", "run", "--load=nan"], "--load is nan: it must be a number above 0."),
        (
            ["dcp_kernels", "--live", "0.0001"],
            "--live is 0.0001: it must be more than one token of",
        ),
        (["dcp_serving", "--contexts", "2000"], "--contexts is 2000: it must be at most 1024"),
        (["dcp_serving", "--contexts", "2", "--answer-share=0.1"], "--answer-share is 0.1: of --contexts 2"),
        (["dcp_serving", "--dense=d", "--profiles=p"], "--model and --dense go together."),
        ([*GOODPUT, "--prompt=9", "--trace=setup.cfg"], "--trace is setup.cfg: it must be a file."),
        ([*GOODPUT, "--prompt=131000"], "--prompt is 131000: with answers of 343 tokens it must be at most"),
        ([*GOODPUT, "--rates", "9", "0.01"], "--rates has 0.01: within --seconds, 30, no request arrives."),
        ([*GOODPUT, "--max-model-len=512"], "--max-model-len is 512: it must be at least 686."),
        ([*GOODPUT, "--output=5"], "--output is 5: it goes with --prompt only."),
        ([*GOODPUT, "--save=."], "--save is ., which cannot be written"),
        (["kernels", "--lengths", "1024", "0"], "--lengths is 0: it must be at least 1."),
        (["kernels", "--gates=gates.safetensors"], "--gates is gates.safetensors: it must be a file."),
        (["page_size", "--prompt=8192"], "--prompt is 8192: it must be from 1 to 8128."),
        ([*PRECISION, "--context=1000"], "--context is 1000: it must divide 65536"),
        ([*PRECISION, "--seeds", "0", "-1"], "--seeds"),
        ([*PRECISION, "--lr=inf"], "--lr is inf: it must be a number above 0."),
        (["scheduler_cost", "--steps=0"], "--steps is 0: it must be at least 1."),
        ([*SERVING, "--requests=0", "--latency"], "--requests is 0 and --latency has no lengths"),
        (["serving", "report", "f", "--tflops=600"], "--copy-tbs and --tflops go together."),
        ([*SERVING, "--heads=7"], "--hidden 1536 and --heads 7 do not go together"),
        ([*SERVING, "--gpu-memory-utilization=0"], "--gpu-memory-utilization is 0"),
        (["training", "steps", "run"], "run is run: it must be the --output folder of a training script."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    argv: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert said in refused(f"benchmarks.{argv[0]}", argv[1:], monkeypatch, capsys, tmp_path)


def test_windows_of_a_step_divide_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "arguments.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    argv = ["steps", str(tmp_path / "run"), "--lengths", "1000"]
    said = refused("benchmarks.training", argv, monkeypatch, capsys, tmp_path / "empty")
    assert "--lengths is 1000: it must divide a step of 65536 tokens, or be longer." in said


def test_room_for_prompt_and_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    said = refused("benchmarks.live_pages", ["--prompt=8000", "--answer=200"], monkeypatch, capsys, tmp_path)
    assert "--prompt 8000 and --answer 200 are together more than 8192 tokens." in said


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--turns=20"], "--turns 20 are together 11264 tokens, which is more than 8192."),
        (["--turns=3", "--crowded=4"], "--crowded is 4: it must be at most --turns 3."),
    ],
)
def test_room_for_all_turns(
    argv: list[str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    assert expected in refused("benchmarks.cached_pages", argv, monkeypatch, capsys, tmp_path)


def test_figures_are_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "figures.json"
    record.save(file, {"speed": 1})
    assert record.saved(file) == {"speed": 1}

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        record.save(file, {"speed": 2})
    assert record.saved(file) == {"speed": 1} and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["", '{"figures": {"sp', "[]", json.dumps({"environment": {}})])
def test_a_file_that_is_torn_or_another_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text(content)
    with pytest.raises(SystemExit, match="torn.json is no file that a benchmark has saved"):
        record.saved(tmp_path / "torn.json")
