"""examples/finetune_dcp.py: what it learns, resumed runs, what it exports, and its errors."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)
from tests.support.training_scripts import Script, log

DCP = Script(
    "finetune_dcp.py",
    (
        "--cpu", "--layers=2", "--hidden=64", "--heads=2", "--vocab=400", "--context=128", "--batch=4",
        "--micro-batch=2", "--dense-steps=30", "--steps=50", "--warmup=3", "--save-every=10", "--eval-every=25",
        "--eval-windows=2", "--lr=0.004", "--int-n-embd=16", "--gamma=6",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted: a small dense GPT-2, then one that drops."""
    output = tmp_path_factory.mktemp("dcp")
    assert "is ready" in DCP.run_alone(text, output)
    return output


def test_it_learns_to_drop(whole: Path) -> None:
    dense, lines = log(whole, "dense_log.jsonl"), log(whole)
    assert [line["step"] for line in dense] == list(range(1, 31))
    assert dense[-1]["loss"] < dense[0]["loss"] - 0.3
    last = lines[-1]
    assert last["step"] == 50 and last["pruned_share"] > 0.3
    # What it drops, it can do without: so far into training, it is no worse than it began.
    assert last["validation_loss"] < dense[-1]["validation_loss"]


def test_its_models_load_as_they_are(whole: Path) -> None:
    """The dense one as transformers' own GPT-2; both with the tokenizer; figures as logged, up to bfloat16."""
    assert isinstance(AutoModelForCausalLM.from_pretrained(whole / "dense"), GPT2LMHeadModel)
    model = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32).eval()
    assert json.loads((whole / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    assert tokenizer.decode(tokenizer("def main():").input_ids) == "def main():"
    import numpy as np

    there = np.load(whole / "data" / "held_out.npy").astype(np.int64)
    windows = there[: len(there) // 128 * 128].reshape(-1, 128)
    held_out = windows[[0, len(windows) // 2]]
    shares = model.visible_shares(torch.from_numpy(held_out))
    # What is left is little: a difference that is small beside 1 may be all of it. bfloat16 weights move scores by
    # u, and with them a few pairs over the step.
    assert shares.mean().item() == pytest.approx(1 - log(whole)[-1]["pruned_share"], rel=0.05)


def test_a_killed_run_goes_on_to_the_same_model(text: Path, whole: Path, tmp_path: Path) -> None:
    assert DCP.stopped_at(text, tmp_path, 15, signal.SIGKILL) == -9
    assert len(log(tmp_path)) == 15
    DCP.run(text, tmp_path)
    assert log(tmp_path) == log(whole)
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, tmp_path))
    assert first == second


def test_from_a_checkpoint_and_dense_to_compare(text: Path, whole: Path, tmp_path: Path) -> None:
    """--gpt2 starts from what is given, with its tokenizer; --dense drops nothing."""
    output = DCP.run(text, tmp_path, f"--gpt2={whole / 'dense'}", "--dense", "--steps=10")
    assert "is ready" in output and not (tmp_path / "dense").exists()
    lines = log(tmp_path)
    assert lines[0]["loss"] == pytest.approx(log(whole, "dense_log.jsonl")[-1]["loss"], abs=0.2)
    assert lines[-1]["validation_loss"] < log(whole, "dense_log.jsonl")[-1]["validation_loss"]
    assert "pruned_share" not in lines[-1]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), GPT2LMHeadModel)


def test_a_local_window_to_compare(text: Path, whole: Path, tmp_path: Path) -> None:
    """It sees little, and its loss says so."""
    start = f"--gpt2={whole / 'dense'}"
    for name, option in (("near", "--window=2"), ("all", "--window=128"), ("dense", "--dense")):
        DCP.run(text, tmp_path / name, start, option, "--steps=5")
    near, whole_window, dense = (log(tmp_path / name)[-1]["validation_loss"] for name in ("near", "all", "dense"))
    assert near > dense + 0.01
    # The same sums in another order, in float32.
    assert whole_window == pytest.approx(dense, abs=1e-6)


def test_errors_name_what_is_wrong(text: Path, whole: Path, tmp_path: Path) -> None:
    cases = [
        (["--gpt2", str(tmp_path / "nowhere")], "nowhere is no GPT-2 checkpoint"),
        (["--gpt2", str(whole / "dense"), "--context=256"], "has 128 positions: --context is 256"),
        (["--gpt2", str(whole / "model")], "is a sparse_gpt2: a gpt2 is needed"),
        (["--heads=3"], "--hidden is 64: it must be a multiple of --heads 3"),
    ]
    runs = [DCP.arguments(text, tmp_path / str(n), *more) for n, (more, _) in enumerate(cases)]
    for found, (_, message) in zip(DCP.errors(runs), cases, strict=True):
        assert re.search(message, found), (message, found)
