"""The benchmark of what pruning loses: its weights against the formula, what it finds, and that it can fail."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bound
from benchmarks.one_layer import OneLayer
from benchmarks.record import saved
from tests.support import ROOT
from tests.support.harness import random_inputs

LENGTH = 2048
PROMISE = math.exp(-10)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    argv = ["bound", str(ROOT / "examples" / "fox-tiny"), f"--context={LENGTH}", "--windows=1", *options]
    monkeypatch.setattr(sys, "argv", argv)
    bound.main()


def test_weights_are_those_of_the_formula() -> None:
    """With full [T, T] matrices. A page is dead once D of its last key is under the head's threshold."""
    length, size = 300, 16
    inputs = random_inputs(length)
    inputs["log_f"] = 0.1 * inputs["log_f"] - 0.02
    threshold = torch.tensor([[-1.0], [-4.0]])
    layer = OneLayer(page_size=size, threshold=threshold)
    slot = layer.open()
    layer.step([(slot, inputs)], release=False)
    q, log_f = (inputs[name][:, :, 0] for name in ("q", "log_f"))
    found = bound.lost(layer, slot, q.to(layer.device), log_f.to(layer.device), 32**-0.5)
    q, k, c = (x.double().transpose(0, 1) for x in (q, inputs["k"], log_f.double().cumsum(0)))
    decay = c[:, :, None] - c[:, None]  # [heads, queries, keys]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    weights = (q @ k.mT / 32**0.5 + decay).masked_fill(~causal, -math.inf).softmax(-1)
    last_key = (torch.arange(length) // size * size + size - 1).clamp(max=length - 1)
    dead = (decay[..., last_key] < threshold[..., None]) & causal[:, last_key]
    wanted = torch.where(dead, weights, 0.0).sum(-1)
    assert wanted.max() > 1e-3
    torch.testing.assert_close(found.weight, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.share, (dead.sum((1, 2)) / causal.sum()).double(), rtol=1e-6, atol=0)


def test_the_shipped_model_keeps_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "--pages", "float32", "float8", f"--json={tmp_path / 'found.json'}")
    found = saved(tmp_path / "found.json")["pages"]
    said = capsys.readouterr().out
    assert said.count("the promise is kept") == 2 and "BROKEN" not in said
    for figures in found.values():
        assert 0 < figures["largest"] <= figures["promise"] == PROMISE
        assert 0 < figures["mean"] <= figures["largest"] == max(layer["largest"] for layer in figures["layers"])
        assert figures["pruned_median"] > 0.5
    # The bound of float8's rounding lowers thresholds, so less is pruned.
    assert found["float8"]["pruned_median"] < found["float32"]["pruned_median"]
    assert abs(found["float32"]["difference"]) < 1e-4


def test_thresholds_that_are_too_high_break_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="The promise is broken"):
        run(monkeypatch, "--pages", "float32", "--raise-by=25", f"--json={tmp_path / 'found.json'}")
    figures = saved(tmp_path / "found.json")["pages"]["float32"]
    assert figures["largest"] > PROMISE and not figures["kept"]
    assert "the promise is BROKEN" in capsys.readouterr().out


def test_a_model_that_forgets_nothing_is_refused(dcp_tiny: Path) -> None:
    with pytest.raises(SystemExit, match="must be a Forgetting Transformer"):
        bound.load(dcp_tiny, torch.float32)


@pytest.mark.parametrize(("words", "source"), [([], "The standard library"), (["--text=TEXT"], "--text .*")])
def test_too_little_text_is_named(
    words: list[str], source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("import os\n")
    monkeypatch.setattr(bound, "standard_library", lambda: [tmp_path / "one.txt"])
    with pytest.raises(SystemExit, match=rf"{source} has \d+ tokens, less than --context {LENGTH}"):
        run(monkeypatch, *(word.replace("TEXT", str(tmp_path)) for word in words))
