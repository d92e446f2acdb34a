"""Options of the examples: every number has a range, and what cannot be is refused in one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path

import command_line
import pytest

from tests.support.command_lines import check_ranges, refused, scripts

FOX, DCP = ["train_fox", "t", "--output=o", "--cpu"], ["finetune_dcp", "t", "--output=o", "--cpu"]
BATCH, SERVE = ["ray_batch", "p", "a"], ["ray_serve"]


@pytest.mark.parametrize("script", scripts("examples"))
def test_every_number_has_a_range(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_ranges(script, monkeypatch)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*FOX, "--eval-windows=0"], "--eval-windows is 0: it must be at least 1."),
        ([*FOX, "--lr=nan"], "--lr is nan: it must be a number above 0."),
        ([*FOX, "--lr=-inf"], "--lr is -inf: it must be a number above 0."),
        ([*FOX, "--weight-decay=-0.1"], "--weight-decay is -0.1: it must be a number from 0 on."),
        ([*FOX, "--seed=-1"], "--seed is -1: it must be from 0 to 4294967295."),
        ([*FOX, "--steps=99999999999"], "--steps is 99999999999: it must be from 1 to 2147483647."),
        ([*FOX, "--steps=many"], "--steps is 'many': it must be a whole number from 1 to 2147483647."),
        ([*FOX, "--vocab=256"], "--vocab is 256: it must be from 257 to 1048576."),
        ([*FOX, "--context=1"], "--context is 1: it must be at least 2."),
        ([*FOX, "--batch=3"], "--batch is 3: it must be a multiple of --micro-batch 2."),
        ([*FOX, "--heads=7"], "--hidden is 768 and --heads 7"),
        ([*DCP, "--heads=7"], "--hidden is 768: it must be a multiple of --heads 7."),
        ([*DCP, "--dense-lr=0"], "--dense-lr is 0: it must be a number above 0."),
        ([*DCP, "--alpha=0.5"], "--alpha is 0.5: it must be a number from 1 on."),
        ([*DCP, "--window=2000"], "--window is 2000: it must be from 1 to --context 1024"),
        ([*DCP, "--alpha-steps=9", "--steps=8"], "--alpha-steps is 9: it must be at most --steps 8."),
        ([*BATCH, "--batch-size=0"], "--batch-size is 0: it must be at least 1."),
        ([*BATCH, "--temperature=nan"], "--temperature is nan: it must be a number from 0 on."),
        ([*BATCH, "--engine-args=[1]"], "--engine-args is '[1]': it must be a JSON object"),
        ([*BATCH, "--engine-args={"], "--engine-args is '{': it must be a JSON object"),
        (
            [*BATCH, '--engine-args={"tensor_parallel_size": 2}'],
            "--engine-args has tensor_parallel_size: give --tensor-parallel-size instead.",
        ),
        ([*SERVE, "--port=70000"], "--port is 70000: it must be from 1 to 65535."),
        ([*SERVE, "--min-replicas=2"], "--min-replicas is 2: it must be at most --max-replicas 1."),
        (["offline", "--fox=3"], "--fox is '3': it must be a JSON object"),
        (["offline", "--kv-cache-gib=inf"], "--kv-cache-gib is inf: it must be a number above 0 and at most"),
        (["client", "x", "--max-tokens=0"], "--max-tokens is 0: it must be at least 1."),
        (["demo", "--max-tokens=901"], "--max-tokens is 901: it must be from 1 to 900."),
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
    assert said in refused(argv[0], argv[1:], monkeypatch, capsys, tmp_path)


def test_an_output_that_is_a_file_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import train_fox

    (tmp_path / "o").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        train_fox.main([str(tmp_path), f"--output={tmp_path / 'o'}", "--cpu"])
    assert ended.value.code == 2 and "o, which is not a folder." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (command_line.positive_int, {"1": 1, " 7 ": 7}, ["0", "1.0", "1e3", "2147483648"]),
        (command_line.non_negative_int, {"0": 0}, ["-1"]),
        (command_line.positive_float, {"1e-3": 0.001, "2": 2.0}, ["0", "-0.0"]),
        (command_line.non_negative_float, {"0": 0.0, "1e30": 1e30}, ["-1e-9", "1e31"]),
        (command_line.fraction, {"1": 1.0, "0.5": 0.5}, ["0", "1.01"]),
        (command_line.inner_fraction, {"0.5": 0.5}, ["0", "1"]),
        (command_line.json_object, {'{"a": 1}': {"a": 1}}, ["null", "[]", "{'a': 1}", ""]),
        (command_line.utf8, {"é": "é"}, ["caf\udce9"]),
    ],
    ids=lambda value: "",
)
def test_types(kind: object, good: dict[str, object], bad: list[str]) -> None:
    assert callable(kind)
    assert {text: kind(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)
