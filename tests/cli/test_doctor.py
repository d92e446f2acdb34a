"""``vllm-fox doctor`` finds the faults that are planted here, and what it says to do mends them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from local_server import free_port
from safetensors.torch import load_file, save_file
from vllm import envs

import plugin_setup
from tests.families.windowed.config import WindowedConfig
from tests.support import ROOT, patience
from tests.support.checkpoints import make_checkpoint
from tests.support.evicting import VARIANTS, make_evicting
from vllm_fox.cli import checks
from vllm_fox.families import FAMILIES

from .conftest import Run, documented


@pytest.fixture(autouse=True)
def as_in_a_new_process() -> Iterator[None]:
    """An engine that ran in this process has made vLLM keep the environment's variables."""
    envs.disable_envs_cache()
    yield


def findings(run: Run, *words: str | Path, code: int) -> dict[str, list[dict[str, Any]]]:
    """What is not fine, by the name of the check."""
    done = run("doctor", "--no-self-test", "--json", *words)
    found = done.json()
    assert done.code == code and found["fine"] == (code == 0), found
    bad: dict[str, list[dict[str, Any]]] = {}
    for one in found["findings"]:
        assert (one["mend"] is not None) >= (one["status"] == "wrong"), one
        if one["status"] in ("wrong", "note"):
            bad.setdefault(one["check"], []).append(one)
    return bad


def test_nothing_is_wrong(run: Run, fox_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it: the real plugin, the real configuration of an engine, the real leaf functions."""
    monkeypatch.setattr(checks, "SELF_TEST_S", patience(checks.SELF_TEST_S))
    done = run("doctor", fox_tiny, "--", "--max-model-len", "4096", "--kv-cache-dtype", "fp8")
    assert done.code == 0, done
    lines = dict(line.split(":", 1) for line in done.out.splitlines() if line.startswith("ok "))
    assert {name.split()[1] for name in lines} >= {"vllm", "plugin", "checkpoint", "configuration", "self-test"}
    assert "ForgettingTransformerForCausalLM" in lines["ok      plugin"]
    assert f"`vllm serve {fox_tiny} --max-model-len 4096 --kv-cache-dtype fp8`" in lines["ok      configuration"]
    assert done.out.splitlines()[-1] == "Nothing is wrong."


def test_json_has_the_documented_keys(run: Run) -> None:
    found = run("doctor", "--no-self-test", "--json").json()
    assert {*found, *found["findings"][0]} == documented("doctor")
    named = [one["check"] for one in found["findings"]]
    assert named[:4] == ["python", "packages", "vllm", "plugin"] and "device" in named


def test_plugin_left_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    (one,) = findings(run, code=1)["plugin"]
    assert "VLLM_PLUGINS is 'other'" in one["found"] and one["mend"].endswith("set it to 'other,fox'.")
    monkeypatch.setenv("VLLM_PLUGINS", "other,fox")
    assert "plugin" not in findings(run, code=0)


def test_plugin_not_installed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.importlib.metadata, "entry_points", lambda group: [])
    (one,) = findings(run, code=1)["plugin"]
    assert "does not see the plugin" in one["found"] and "pip install -e ." in one["mend"]


def test_another_vllm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    (one,) = findings(run, code=1)["vllm"]
    assert one["found"].endswith("but vLLM 0.31.2 is installed.") and "Install vllm==0.33.*" in one["mend"]
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    assert "vllm" not in findings(run, code=0)


def test_a_vllm_that_cannot_be_imported(tmp_path: Path) -> None:
    """A package of that name that is broken, found first."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    command = [sys.executable, "-m", "vllm_fox.cli", "doctor", "--no-self-test", "--json"]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    wrong = [one for one in json.loads(done.stdout)["findings"] if one["status"] == "wrong"]
    assert done.returncode == 1 and [one["check"] for one in wrong] == ["vllm"]
    assert "libcudart.so.12" in wrong[0]["found"] and "make setup" in wrong[0]["mend"]


def test_no_triton_beside_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing needs it; a driver says that there is a GPU."""
    version_of, find_spec = checks.version_of, importlib.util.find_spec
    monkeypatch.setattr(checks, "version_of", lambda *names: None if "triton" in names else version_of(*names))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    for driver, status, code in ((None, "note", 0), ("/usr/bin/nvidia-smi", "wrong", 1)):
        monkeypatch.setattr(checks.shutil, "which", lambda name, found=driver: found)
        (one,) = findings(run, code=code)["packages"]
        assert one["status"] == status and one["found"].startswith("triton is not installed")
    assert "pip install triton" in one["mend"]
    monkeypatch.setattr(checks, "version_of", version_of)
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert not findings(run, code=0).get("packages")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_where_one_is_asked_for(run: Run) -> None:
    (one,) = findings(run, "--device", "gpu", code=1)["device"]
    assert "there is none" in one["found"] and "--device cpu" in one["mend"]
    assert "device" not in findings(run, "--device", "cpu", code=0)


@pytest.mark.parametrize(
    "name, value, mend",
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "Unset PYTORCH_CUDA_ALLOC_CONF."),
        (
            "PYTORCH_CUDA_ALLOC_CONF",
            "max_split_size_mb:64,expandable_segments:True",
            "Take expandable_segments out: PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64.",
        ),
        ("VLLM_BATCH_INVARIANT", "1", "Unset VLLM_BATCH_INVARIANT."),
        ("VLLM_KV_CACHE_LAYOUT", "NHD", "Unset VLLM_KV_CACHE_LAYOUT."),
        ("VLLM_BATCH_INVARIANT", "yes", "Unset the variable, or correct its value."),
        ("TRITON_INTERPRET", "1", "Unset TRITON_INTERPRET."),
    ],
)
def test_variables_that_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, mend: str
) -> None:
    monkeypatch.setenv(name, value)
    (one,) = findings(run, code=1)["environment"]
    assert (value in one["found"] or name in one["found"]) and one["mend"] == mend
    kept = mend.partition("=")[2].removesuffix(".")
    monkeypatch.setenv(name, kept) if kept else monkeypatch.delenv(name)
    assert "environment" not in findings(run, code=0)


def test_a_variable_that_vllm_does_not_know(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPCE", "4")
    (one,) = findings(run, code=0)["environment"]
    assert one["status"] == "note" and one["mend"] == "Did you mean VLLM_CPU_KVCACHE_SPACE?"


def test_a_port_in_use(run: Run) -> None:
    with socket.socket() as taken:
        number = free_port()
        taken.bind(("", number))
        taken.listen()
        (one,) = findings(run, "--port", str(number), code=1)["port"]
        assert one["found"] == f"Port {number} is in use."
        other = one["mend"].rpartition("--port ")[2].removesuffix(".")
        assert "port" not in findings(run, "--port", other, code=0)
    assert "port" not in findings(run, "--port", str(number), code=0)


def test_broken_checkpoints(run: Run, tmp_path: Path) -> None:
    """A shard is missing; one is cut short; a tensor is of another shape; config.json has an unknown field."""
    model = make_checkpoint(tmp_path / "model", qk_norm=True, shards=2)
    assert "checkpoint" not in findings(run, model, code=0)
    first, second = sorted(model.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-64])
    (one,) = findings(run, model, code=1)["checkpoint"]
    assert f"{second} is damaged" in one["found"] and one["mend"] == "Copy it again."
    second.unlink()
    (one,) = findings(run, model, code=1)["checkpoint"]
    assert f"{second} is missing" in one["found"] and one["mend"] == "Copy it again."
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (one,) = findings(run, model, code=1)["checkpoint"]
    assert f"{second} is cut short or no safetensors file" in one["found"]
    second.write_bytes(whole)
    assert "checkpoint" not in findings(run, model, code=0), "as it was copied again"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    (one,) = findings(run, model, code=1)["checkpoint"]
    assert "asks for" in one["found"] and "config.json that belongs to the weights" in one["mend"]
    (model / "config.json").write_text(json.dumps(config | {"qk_nrm": True}))
    (one,) = findings(run, model, code=1)["checkpoint"]
    assert "unknown field qk_nrm" in one["found"] and one["mend"] == "Did you mean qk_norm?"
    (one,) = findings(run, tmp_path / "none", code=1)["checkpoint"]
    assert "which is no folder" in one["found"]


def assert_only_its_memory_is_not_known(run: Run, model: Path, said: str, too_long: int) -> None:
    """A note says so. The configuration is checked all the same, and is right but for a length that is too long."""
    bad = findings(run, model, code=0)
    (one,) = bad["checkpoint"]
    assert one["status"] == "note" and said in one["found"]
    assert "configuration" not in bad
    (one,) = findings(run, model, "--", "--max-model-len", str(too_long), code=1)["configuration"]
    assert f"max_model_len ({too_long}) is greater than" in one["found"]


def test_another_model_of_vllms_own(run: Run, tmp_path: Path) -> None:
    """How much memory it takes is not known here, and vLLM serves it. So its configuration is checked."""
    model = make_checkpoint(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 257}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512}
    config = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config | sizes | heads))
    assert_only_its_memory_is_not_known(
        run, model, "model_type is 'gemma': how much KV it holds is not known", 1024
    )
    (model / "config.json").write_text(json.dumps(config | sizes | heads | {"model_type": "no_such"}))
    bad = findings(run, model, code=1)
    assert [bad[check][0]["status"] for check in ("checkpoint", "configuration")] == ["note", "wrong"]


def test_a_family_of_another_package(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the guide, as if its package were installed."""
    model = make_checkpoint(tmp_path / "model")
    config = WindowedConfig(architectures=["WindowedForCausalLM"], bos_token_id=0, eos_token_id=0)
    config.save_pretrained(model)
    installed = tmp_path / "site" / "windowed-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Name: windowed\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[vllm_fox.families]\nwindowed = tests.families.windowed:WINDOWED\n"
    )
    monkeypatch.syspath_prepend(installed.parent)
    plugin_setup.register()
    assert_only_its_memory_is_not_known(run, model, "Windowed decoders are of another package", 4096)


def test_gates_that_never_close(run: Run, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, fgate_type="none", use_rope=True)
    (one,) = findings(run, model, code=0)["checkpoint"]
    assert (
        one["status"] == "note" and "no forget gates" in one["found"] and "no memory is given back" in one["mend"]
    )


def test_gates_that_training_closes(run: Run, tmp_path: Path) -> None:
    """Biases that keep constant gates open, and those that training would lead to."""
    model = make_checkpoint(tmp_path, fgate_type="bias_only", qk_norm=True)
    file = model / "model.safetensors"
    tensors = load_file(file)
    gates = [name for name in tensors if name.endswith("fgate_bias")]
    save_file(tensors | {name: torch.full_like(tensors[name], 30.0) for name in gates}, file, {"format": "pt"})
    (one,) = findings(run, model, code=0)["checkpoint"]
    assert one["status"] == "note" and "gates stay so far open" in one["found"] and "train it on" in one["mend"]
    save_file(tensors | {name: torch.full_like(tensors[name], 1.0) for name in gates}, file, {"format": "pt"})
    assert "checkpoint" not in findings(run, model, code=0)


def test_a_published_checkpoint(run: Run, tmp_path: Path) -> None:
    """What it says to do mends it."""
    made = make_evicting(tmp_path, VARIANTS["qwen3-borrowed"])
    (one,) = findings(run, made.published, code=1)["checkpoint"]
    assert "DMS" in one["found"] and one["mend"].startswith(f"Convert it: `vllm-fox convert {made.published} OUT`")
    (one,) = checks.checkpoint(str(made.served))
    assert one.status is checks.Status.OK and one.found.startswith("Decoders that evict tokens: ")


@pytest.mark.parametrize(
    "words, found, mend",
    [
        (["--enable-lora"], "do not support LoRA (--enable-lora) on a CPU", "Leave --enable-lora out."),
        (["--block-size", "32"], "--block-size 32 is not used", "Change what the message names."),
        (["--max-model-len", "0"], "max_model_len", "Change what the message names."),
        (["--enable-lorra"], "unrecognized arguments: --enable-lorra.", "Correct what stands behind --"),
        (["--additional-config", '{"fox": {"page_size": 48}}'], "fox.page_size is 48", "Change what"),
    ],
)
def test_arguments_that_are_refused(run: Run, fox_tiny: Path, words: list[str], found: str, mend: str) -> None:
    """By vLLM's parser, by vLLM's configuration and by ours."""
    (one,) = findings(run, fox_tiny, "--", *words, code=1)["configuration"]
    assert found in one["found"] and one["mend"].startswith(mend), one


def test_arguments_need_a_model(run: Run) -> None:
    done = run("doctor", "--", "--enable-lora")
    assert done.code == 2 and done.err.count("\n") == 1


def test_the_self_test_runs_triton_too() -> None:
    """In Triton's interpreter, as a GPU would; the plain functions have run above."""
    command = [sys.executable, "-m", "vllm_fox.cli.self_test", "cpu"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert [one["family"] for one in found["families"]] == [family.name for family in FAMILIES]
    for one in found["families"]:
        assert one["difference"] < found["tolerance"] and one["released"] == one["expected"] >= 4


def test_leaf_functions_that_fail(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's process ends with an error, takes too long, or computes something else."""

    def found() -> checks.Finding:
        (one,) = checks.self_test(gpu=False)
        assert one.status is checks.Status.WRONG and one.mend
        return one

    real = subprocess.run

    def say(code: str) -> None:
        monkeypatch.setattr(
            checks.subprocess, "run", lambda command, **options: real([sys.executable, "-c", code], **options)
        )

    say("raise OSError('libtriton.so: no such file')")
    assert "libtriton.so: no such file" in found().found
    one = {"difference": 0.0, "released": 4, "expected": 4}
    for change, part in (({"difference": math.nan}, "wrong on CPU by nan"), ({"released": 0}, "find 0 pages dead")):
        families = [{"family": "Some models", **one}, {"family": "Other models", **one, **change}]
        result = {"families": families, "tolerance": 0.05, "seconds": 1, "device": "CPU"}
        say(f"print({json.dumps(result)!r})")
        assert part in (said := found().found) and "of Other models " in said
    monkeypatch.setattr(checks, "SELF_TEST_S", 0.2)
    say("import time; time.sleep(20)")
    assert "did not end in 0.2 seconds" in found().found
