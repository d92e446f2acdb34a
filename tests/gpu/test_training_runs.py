"""examples/train_fox.py on two GPUs, by data parallelism and by FSDP2: what one GPU gives, and exact resumption."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support import ROOT, patience
from tests.support.training_scripts import Script, log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]
STEPS = 300
COMPARED = 14
"""Steps whose losses are compared with one GPU's: later ones are of models that have grown apart."""
KILLED = 20
FOX = Script(
    "train_fox.py",
    (
        "--layers=2", "--hidden=128", "--heads=2", "--vocab=400", "--context=1024", "--batch=4", "--micro-batch=1",
        f"--steps={STEPS}", "--warmup=3", "--save-every=10", "--eval-every=100", "--eval-windows=2", "--lr=0.003",
        "--compile",
    ),
)  # fmt: skip
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
"""What `accelerate launch --use_fsdp` sets."""
LAUNCHES: dict[str, dict[str, str]] = {"data parallel": {}, "FSDP2": SHARDED}


def start(text: Path, output: Path, processes: int, environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a run of several processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.Popen(
        [*launch, *FOX.command(text, output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


def finish(run: subprocess.Popen[str]) -> None:
    said, _ = run.communicate(timeout=patience(240))
    assert run.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source code of this project."""
    folder = tmp_path_factory.mktemp("text")
    sources = [path for part in ("vllm_fox", "benchmarks", "tests") for path in (ROOT / part).rglob("*.py")]
    for number, path in enumerate(sorted(sources)):
        (folder / f"{number}.txt").write_text(path.read_text())
    return folder


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    output = tmp_path_factory.mktemp("alone")
    FOX.run_alone(text, output)
    return output


@pytest.mark.parametrize("kind", LAUNCHES)
def test_two_gpus_train_as_one(kind: str, text: Path, alone: Path, tmp_path: Path) -> None:
    """The same losses, bit by bit the same after a kill, and a checkpoint that one GPU goes on with."""
    environment = LAUNCHES[kind]
    finish(start(text, tmp_path / "whole", 2, environment))
    assert len(log(tmp_path / "whole")) == len(log(alone)) == STEPS
    for line, expected in zip(log(tmp_path / "whole")[:COMPARED], log(alone)):
        # Sums in another order, which training makes larger differences of.
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5 if line["step"] == 1 else 3e-3)

    killed = start(text, tmp_path / "killed", 2, environment)
    deadline = time.monotonic() + patience(240)
    while len(log(tmp_path / "killed")) < KILLED and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    # The launcher gives each of its processes a group of its own.
    for process in (*psutil.Process(killed.pid).children(recursive=True), killed):
        process.kill()
    killed.communicate()
    assert KILLED <= len(log(tmp_path / "killed")) < STEPS
    shutil.copytree(tmp_path / "killed", tmp_path / "one")

    finish(start(text, tmp_path / "killed", 2, environment))
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("killed", "whole")]
    assert weights[0].keys() == weights[1].keys() == load_file(alone / "model" / "model.safetensors").keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    done = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "one" / "checkpoints").glob("step-*"))
    finish(start(text, tmp_path / "one", 1, environment))
    assert len(log(tmp_path / "one")) == STEPS
    for line, expected in zip(log(tmp_path / "one")[: done + COMPARED], log(tmp_path / "whole")):
        assert line["loss"] == pytest.approx(expected["loss"], rel=3e-3)
