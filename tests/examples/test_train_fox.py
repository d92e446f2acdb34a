"""examples/train_fox.py: interrupted, killed and resumed runs, what it exports, and its errors."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_run
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from whole_files import CONTENTS, list_contents

from benchmarks.engines import engine, generate, greedy
from tests.support.training_scripts import ROOT, Script, forks, log
from vllm_fox.families.fox.config import FoxConfig
from vllm_fox.hf import ForgettingTransformerForCausalLM

FOX = Script(
    "train_fox.py",
    (
        "--cpu", "--layers=2", "--hidden=64", "--heads=2", "--vocab=400", "--context=128", "--batch=4",
        "--micro-batch=2", "--steps=30", "--warmup=3", "--save-every=4", "--eval-every=10", "--eval-windows=2",
        "--optimizer=muon", "--lr=0.005",
    ),
)  # fmt: skip
arguments, run, stopped_at = FOX.arguments, FOX.run, FOX.stopped_at


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole")
    assert "is ready" in FOX.run_alone(text, output)
    return output


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["killed", "ctrl-c"])
def test_a_resumed_run_is_the_run_that_never_stopped(
    text: Path, whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """Loss by loss, gradient norm by gradient norm, weight by weight."""
    assert stopped_at(text, tmp_path, 10, number) == code
    assert len(log(tmp_path)) == 10 and not (tmp_path / "model").exists()
    run(text, tmp_path)
    assert log(tmp_path) == log(whole)
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, tmp_path))
    assert first == second


def test_two_processes_share_a_step(text: Path, whole: Path, tmp_path: Path) -> None:
    """Half of each batch each, the same losses up to the order of sums."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *FOX.command(text, tmp_path)]
    done = subprocess.run(launch, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "2 processes on cpu" in done.stdout, done.stderr[-3000:]
    for line, expected in zip(log(tmp_path), log(whole), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    # Before training makes differences larger: sums in another order, in float32.
    assert log(tmp_path)[0]["loss"] == pytest.approx(log(whole)[0]["loss"], rel=1e-6)
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_checkpoint_of_other_weights_is_named(text: Path, whole: Path, tmp_path: Path) -> None:
    """Such as one whose names have a prefix."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    shutil.rmtree(output / "checkpoints" / "step-30")
    checkpoint = output / "checkpoints" / "step-28"
    weights = load_file(checkpoint / "model.safetensors")
    save_file({f"module.{name}": weight for name, weight in weights.items()}, checkpoint / "model.safetensors")
    (checkpoint / CONTENTS).unlink()
    list_contents(checkpoint)
    (error,) = FOX.errors([arguments(text, output)])
    assert "step-28 has other weights than this run" in error and "earlier version" in error


def test_compiled_or_with_another_optimizer(text: Path, whole: Path, tmp_path: Path) -> None:
    """Compiled, the first steps give the same losses; AdamW's second step does not."""
    run(text, tmp_path / "compiled", "--compile", "--steps=2", "--eval-every=2")
    for line, expected in zip(log(tmp_path / "compiled"), log(whole)):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    # Before training makes differences larger: sums in another order, in float32.
    assert log(tmp_path / "compiled")[0]["loss"] == pytest.approx(log(whole)[0]["loss"], rel=1e-6)
    run(text, tmp_path / "adamw", "--optimizer=adamw", "--steps=3", "--eval-every=0")
    losses, expected = ([line["loss"] for line in log(folder)] for folder in (tmp_path / "adamw", whole))
    assert losses[0] == expected[0] and losses[2] != expected[2]


def test_it_learns_and_reports(whole: Path) -> None:
    lines = log(whole)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [10, 20, 30]
    assert all(0 < line["live_share"] <= 1 for line in validated)
    assert list((whole / "tensorboard").rglob("events.out.tfevents.*"))
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-28", "step-30"]


def test_its_model_is_served_as_it_is(whole: Path) -> None:
    folder = whole / "model"
    assert AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    saved = load_file(folder / "model.safetensors")
    assert "model.embeddings.weight" in saved and "lm_head.weight" not in saved  # tied: once
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "def main(argv=None):\n    "
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    want = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    with engine(folder, max_model_len=128) as llm:
        (out,) = generate(llm, [ids[0].tolist()], greedy(16))
    assert list(out.outputs[0].token_ids) == want[0, ids.shape[1] :].tolist()


def test_constant_gates_are_exported_in_float32(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All else in bfloat16."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from accelerate import Accelerator
    from training_run import export

    sizes = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2}
    gates = {"fgate_type": "fixed", "fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 4096.0}
    model = ForgettingTransformerForCausalLM(FoxConfig(**sizes, **gates))
    export(Accelerator(cpu=True), model, argparse.Namespace(output=whole, context=128), tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    wide = {name for name, x in saved.items() if x.dtype != torch.bfloat16}
    assert wide == {f"model.layers.{n}.attn.fgate_bias" for n in range(2)}
    assert all(torch.equal(saved[name], model.state_dict()[name]) for name in wide)


def test_copies_of_a_text_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one could be held out and another trained on."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from text_corpus import find_texts

    for name, content in (("a.py", "x = 1"), ("b.py", "y = 2"), ("c.py", "x = 1")):
        (tmp_path / name).write_text(content)
    assert [path.name for path in find_texts(tmp_path)] == ["a.py", "b.py"]


def test_errors_name_what_is_wrong(text: Path, whole: Path, tmp_path: Path) -> None:
    """One sentence each, and no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("Too little.\n")
    cases = [
        ([tmp_path / "nowhere", tmp_path / "1"], "nowhere is not a folder"),
        ([tmp_path / "empty", tmp_path / "2"], "no text to train on: it is empty"),
        ([tmp_path / "binary", tmp_path / "3"], "none of its 1 files is UTF-8 text"),
        ([tmp_path / "short", tmp_path / "4"], "too little text: .* Give more text, or a smaller --context"),
        ([text, tmp_path / "5", "--heads", "3"], "num_heads"),
        ([text, tmp_path / "6", "--batch", "3"], "--batch is 3: it must be a multiple of --micro-batch 2"),
        ([text, whole, "--lr", "0.01"], "holds a run with --lr 0.005, not 0.01"),
    ]
    runs = [arguments(*args) for args, _ in cases]  # type: ignore[arg-type]
    runs.append([arg for arg in arguments(text, tmp_path / "7") if arg != "--cpu"])
    messages = [*(message for _, message in cases), "No CUDA GPU was found"]
    found = FOX.errors(runs)
    for line, message in zip(found, messages, strict=True):
        assert re.search(message, line), (message, line)


@pytest.mark.parametrize("listed", [True, False], ids=["now", "of an earlier version"])
def test_what_a_power_cut_tears_is_named_and_the_run_goes_on(
    text: Path, whole: Path, tmp_path: Path, listed: bool
) -> None:
    """From the newest checkpoint that is whole, to the same model."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    torn = output / "checkpoints" / "step-30"
    os.truncate(torn / "optimizer.bin", (torn / "optimizer.bin").stat().st_size // 2)
    if listed:
        shutil.copytree(torn, output / "checkpoints" / "step-40")
        (output / "checkpoints" / "step-40" / "contents.json").write_text("")
    else:
        for folder in (output / "checkpoints").iterdir():
            (folder / "contents.json").unlink()
        (output / "checkpoints" / "step-40").mkdir()
    os.truncate(output / "arguments.json", 0)
    os.truncate(output / "data" / "facts.json", 10)
    os.truncate(output / "log.jsonl", (output / "log.jsonl").stat().st_size - 5)
    (output / "model" / "config.json").write_text("")
    said = run(text, output)
    for name in ("optimizer.bin", "arguments.json", "facts.json", "log.jsonl, line 30"):
        assert re.search(rf"{name}.* torn", said), said
    assert log(output) == log(whole)
    assert json.loads((output / "arguments.json").read_text()) == json.loads((whole / "arguments.json").read_text())
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, output))
    assert first == second
    names = {path.name for path in (output / "checkpoints").iterdir()}
    assert names == {"step-28", "step-30", "step-30.torn", "step-40.torn"}


def test_a_refused_run_does_not_stand_in_the_way_of_its_correction(text: Path, tmp_path: Path) -> None:
    """Nothing is written by it: not its arguments, with which the corrected command would be compared."""
    output = tmp_path / "run"
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("Too little.\n")
    wrong = [
        (arguments(tmp_path / "nowhere", output), "is not a folder"),
        (arguments(tmp_path / "short", output), "too little text"),
        (arguments(text, output, "--context=100000"), "too little text"),
        (arguments(text, output, "--batch=6", "--micro-batch=4"), "--micro-batch 4"),
        (arguments(text, output, "--heads=3"), "--hidden is 64 and --heads 3"),
    ]
    for line, (_, message) in zip(FOX.errors([argv for argv, _ in wrong]), wrong, strict=True):
        assert message in line
    assert not output.exists()
    # This one trains, but leaves nothing to go on with.
    (line,) = FOX.errors([arguments(text, output, "--lr=1e30")])
    assert re.search(r"The [a-z ]+ of step \d is \w+: try a smaller --lr than 1e\+30\.", line)
    assert "is ready" in run(text, output, "--steps=1")


def test_a_run_of_the_other_script_is_refused(text: Path, whole: Path) -> None:
    (line,) = Script("finetune_dcp.py", FOX.options).errors([arguments(text, whole)])
    assert "holds a run of another script, with --pruning: give another --output." in line


def test_a_full_disk_leaves_no_arguments(text: Path, tmp_path: Path) -> None:
    """The same command goes on once there is room."""
    script = """if 1:
        import os, sys, train_fox
        record = train_fox.record_run
        def full(handle):
            raise OSError(28, "No space left on device")
        def record_run(*args):
            os.fsync = full
            record(*args)
        train_fox.record_run = record_run
        train_fox.main(sys.argv[1:])
    """
    done = forks().run("-c", script, *arguments(text, tmp_path, "--steps=1"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"The disk of {tmp_path} is full: Free some space and run the same command again." in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert "is ready" in run(text, tmp_path, "--steps=1")


def test_a_full_disk_leaves_the_last_checkpoint(text: Path, tmp_path: Path) -> None:
    """The second checkpoint finds no room: torch's own error, raised in its place."""
    script = """if 1:
        import accelerate, sys, train_fox
        save, calls = accelerate.Accelerator.save_state, []
        def full(self, folder):
            calls.append(folder)
            save(self, folder)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
        accelerate.Accelerator.save_state = full
        train_fox.main(sys.argv[1:])
    """
    done = forks().run("-c", script, *arguments(text, tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "is full: the checkpoint of step 8 was not written, step 4 is intact" in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]


def test_a_weight_that_is_nan_is_found_wherever_it_is() -> None:
    """Also after finite ones, and in the last parameter."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert math.isfinite(training_run.largest_weight(model))
    training_run.refuse_what_is_no_number(3, {"largest weight": 1.0}, "--lr", 0.1)
    with torch.no_grad():
        model[1].bias[1] = math.nan
    values = {"largest weight": training_run.largest_weight(model)}
    with pytest.raises(SystemExit, match="The largest weight of step 3 is nan: try a smaller --lr than 0.1."):
        training_run.refuse_what_is_no_number(3, values, "--lr", 0.1)
