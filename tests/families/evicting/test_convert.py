"""Converting published checkpoints that evict tokens: what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.support import ROOT
from tests.support.evicting import THRESHOLD, VARIANTS, Made, make_evicting
from vllm_fox.families.evicting.config import EvictingDecoderConfig, Eviction
from vllm_fox.families.evicting.convert import convert
from vllm_fox.registration import register_configs

register_configs()


@pytest.fixture(scope="module")
def dms(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("dms"), VARIANTS["llama-adapter"])


@pytest.fixture(scope="module")
def kvzap(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("kvzap"), VARIANTS["qwen2-linear"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def changed(made: Made, tmp_path: Path, **fields: Any) -> Path:
    """A copy of the published checkpoint with other fields in its config; None takes one away."""
    folder = tmp_path / "changed"
    shutil.copytree(made.published, folder)
    given = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in given.items() if value is not None})
    )
    return folder


def test_the_config_names_every_choice(dms: Made, kvzap: Made) -> None:
    config = AutoConfig.from_pretrained(dms.served)
    assert isinstance(config, EvictingDecoderConfig)
    assert Eviction.from_dict(config.eviction) == Eviction(
        method="dms_adapter", window=17, shift=1, scale=50.0, offset=-20.0, bias=True
    )
    assert config.attention_bias and config.qkv_bias and config.mlp_bias and config.tie_word_embeddings
    assert not config.qk_norm and config.rope_parameters["rope_type"] == "llama3"
    config = AutoConfig.from_pretrained(kvzap.served)
    assert config.eviction["threshold"] == THRESHOLD and config.eviction["shift"] == 0
    assert config.qkv_bias and not config.attention_bias


def test_weights_and_tokenizer_are_copied(dms: Made, kvzap: Made) -> None:
    before, after = tensors(dms.published), tensors(dms.served)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert kvzap.predictor is not None
    added = tensors(kvzap.served).keys() - tensors(kvzap.published).keys()
    assert added == {f"model.layers.{n}.self_attn.kvzap.{part}" for n in range(2) for part in ("weight", "bias")}
    assert (dms.served / "tokenizer.json").read_bytes() == (dms.published / "tokenizer.json").read_bytes()
    index = json.loads((kvzap.served / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(kvzap.served).keys()


def test_shards_and_code(dms: Made, tmp_path: Path) -> None:
    """Files of an index are taken, as they are named there; Python files stay behind."""
    folder = changed(dms, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "modeling_dms.py").write_text("raise SystemExit")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    list(convert(folder, tmp_path / "out"))
    assert tensors(tmp_path / "out").keys() == weights.keys()
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gemma"}, "model_type is 'gemma': it must be one of llama, mistral, qwen2, qwen3"),
        ({"dms_window": 4}, r"dms_window \(value 4\) is unknown"),
        ({"dms_window_size": 0}, "eviction.window is 0: it must be an integer from 1 on"),
        ({"dms_alpha_per": "token"}, "eviction.decides is 'token': it must be 'head' or 'layer'"),
        (
            {"dms_separate_alpha": False},
            "dms_separate_alpha is False, .* unexpected model.layers.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is supported"),
        ({"num_hidden_layers": 3}, "missing model.layers.2.self_attn.dms_proj_alpha.bias"),
    ],
)
def test_refused_configs(dms: Made, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    """One sentence, and nothing is left behind."""
    folder = changed(dms, tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        list(convert(folder, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_refused_arguments(dms: Made, kvzap: Made, tmp_path: Path) -> None:
    out, predictor = tmp_path / "out", kvzap.predictor
    for source, options, message in [
        (dms.published, {"predictor": predictor}, "evicts tokens by DMS: leave --predictor out"),
        (dms.published, {"threshold": -4.0}, "leave --threshold and --window out"),
        (kvzap.published, {}, "nothing says what is evicted: give a KVzap predictor"),
        (kvzap.published, {"predictor": predictor}, "--threshold is None"),
        (kvzap.published, {"predictor": predictor, "threshold": -4.0, "window": 0}, "eviction.window is 0"),
        (kvzap.published, {"predictor": kvzap.published, "threshold": -4.0}, "model_type is 'qwen2'"),
        (tmp_path, {}, "config.json is missing"),
    ]:
        with pytest.raises(ValueError, match=message):
            list(convert(source, out, **options))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="exists: name a folder that does not"):
        list(convert(dms.published, dms.served))


def test_sliding_windows_are_refused(tmp_path: Path, dms: Made) -> None:
    folder = changed(dms, tmp_path, model_type="mistral", sliding_window=4096, dms_separate_alpha=None)
    with pytest.raises(ValueError, match="sliding_window is 4096: layers with a sliding window are not supported"):
        list(convert(folder, tmp_path / "out"))


@pytest.mark.parametrize(
    "eviction, message",
    [
        ([], r"eviction is \[\]: it must be an object"),
        ({"method": "kvzap"}, "eviction.window is missing"),
        ({"method": "h2o", "window": 4, "shift": 0}, "eviction.method is 'h2o'"),
        ({"method": "kvzap", "window": 4, "shift": 0}, "eviction.threshold is None: kvzap needs a number"),
        (
            {"method": "kvzap", "window": 4, "shift": 0, "threshold": 1, "scale": 2},
            "eviction.scale is 2: kvzap has none",
        ),
        ({"method": "kvzap", "window": 4, "shift": True, "threshold": 1}, "eviction.shift is True"),
        ({"method": "kvzap", "window": 4, "shift": 0, "threshold": 1, "sinks": 4}, "eviction.sinks is unknown"),
        (
            {"method": "dms_adapter", "window": 4, "shift": 1, "scale": 1, "offset": 0, "prefill": "dense"},
            "prefill",
        ),
    ],
)
def test_refused_evictions(eviction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eviction.from_dict(eviction)


def test_command_line(dms: Made, tmp_path: Path) -> None:
    """It says what it did; a mistake is one line, without a traceback."""
    command = [sys.executable, "-m", "vllm_fox.convert"]
    done = subprocess.run([*command, dms.published, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "evicts tokens: by an adapter (DMS), each 17 tokens" in done.stdout
    done = subprocess.run([*command, dms.published, tmp_path / "out"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr == f"{tmp_path / 'out'} exists: name a folder that does not.\n"
