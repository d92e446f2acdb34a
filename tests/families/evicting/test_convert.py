"""Converting published checkpoints that evict tokens: what is written, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
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
        ({"dms_window_size": 0}, "dms_window_size is 0: it must be an integer from 1 on"),
        ({"dms_window_size": "512"}, "dms_window_size is '512': it must be an integer from 1 on"),
        ({"dms_alpha_scale": "100"}, "dms_alpha_scale is '100': it must be a number"),
        ({"dms_initial_alpha_offset": [5]}, r"dms_initial_alpha_offset is \[5\]: it must be a number"),
        ({"dms_initial_alpha_offset": float("nan")}, "dms_initial_alpha_offset is nan: it must be a number"),
        ({"dms_separate_alpha": "true"}, "dms_separate_alpha is 'true': it must be true or false"),
        ({"dms_disable_eviction": 1}, "dms_disable_eviction is 1: it must be true or false"),
        ({"dms_alpha_per": "token"}, "dms_alpha_per is 'token': it must be 'head' or 'layer'"),
        (
            {"dms_separate_alpha": False},
            "dms_separate_alpha is False, .* unexpected model.layers.0",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': only 'silu' is supported"),
        ({"num_hidden_layers": 3}, "missing model.layers.2.self_attn.dms_proj_alpha.bias"),
        ({"num_key_value_heads": 4}, r"dms_proj_alpha.bias is \[2\]: by config.json it must be \[4\]"),
        ({"intermediate_size": 64}, r"down_proj.weight is of another shape, \[64, 96\] and not \[64, 64\] \(and"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing: the weights are not those of the llama"),
        ({"hidden_size": "64"}, "config.json: Validation error for field 'hidden_size': TypeError: "),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}},
            "rope_type is 'spiral': it must be 'default', 'dynamic'",
        ),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types has 'chunked_attention': only 'full_attention'"),
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
        (kvzap.published, {"predictor": predictor, "threshold": -4.0, "window": 0}, "--window is 0"),
        (kvzap.published, {"predictor": kvzap.published, "threshold": -4.0}, "model_type is 'qwen2'"),
        (tmp_path, {}, "config.json is missing"),
        (Path("nvidia/Qwen3-8B-DMS-8x"), {}, "is no folder: download the checkpoint"),
        (kvzap.published, {"predictor": tmp_path / "none", "threshold": -4.0}, "none is no folder: download"),
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
    folder = changed(dms, tmp_path / "2", model_type="mistral", sliding_window=None, dms_separate_alpha=None)
    with pytest.raises(ValueError, match=r"is 4096, its value where it is left out \(null means none\)"):
        list(convert(folder, tmp_path / "out"))


def test_published_configs(kvzap: Made, tmp_path: Path) -> None:
    """Real configs say that a sliding window is not used; and RoPE in the form of transformers 4."""
    assert kvzap.predictor is not None
    options = {"predictor": kvzap.predictor, "threshold": 0.0}
    unused = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 28, "layer_types": None}
    for number, (scaling, wanted) in enumerate(
        [
            (None, {"rope_type": "default"}),
            ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
            (
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            ),
        ]
    ):
        fields = {"rope_theta": 1e6, "rope_scaling": scaling, "rope_parameters": None, "architectures": None}
        folder, out = changed(kvzap, tmp_path / str(number), **unused, **fields), tmp_path / f"out-{number}"
        list(convert(folder, out, **options))
        found = AutoConfig.from_pretrained(out).rope_parameters
        assert wanted.items() <= found.items() and found["rope_theta"] == 1e6


def without_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def with_one_more(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"score.weight": torch.ones(2, 64)}, folder / "model.safetensors")


def index(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    "change, message",
    [
        (without_one, "model.layers.1.self_attn.o_proj.weight is missing: the weights are not those of the llama"),
        (with_one_more, "score.weight is unknown"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing: download it"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"),
            "model.safetensors is missing, and model.bin is not read: save the model as safetensors",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors"),
            "model-00001-of-00001.safetensors is there, but no model.safetensors.index.json that names it",
        ),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"0" * 64),
            "is cut short or no safetensors file: copy it again",
        ),
        (index("{}"), "weight_map is None: it must say for every tensor"),
        (index('{"weight_map": {"a": 1}}'), "a is in 1: it must be the name of a file beside it"),
        (index('{"weight_map": {"a": "../b.safetensors"}}'), "it must be the name of a file beside it"),
        (index('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing: download it"),
    ],
)
def test_refused_weights(dms: Made, tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    folder = changed(dms, tmp_path)
    change(folder)
    with pytest.raises(ValueError, match=message):
        list(convert(folder, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_weights_that_older_checkpoints_have(dms: Made, tmp_path: Path) -> None:
    """Numbers that follow from the config, and a head that is tied to the embedding."""
    folder = changed(dms, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "model.safetensors")
    list(convert(folder, tmp_path / "out"))
    assert tensors(tmp_path / "out").keys() == weights.keys()


def test_a_predictor_that_only_safetensors_refuses(kvzap: Made, tmp_path: Path) -> None:
    """Its header has the right names and shapes, and a dtype that there is not."""
    assert kvzap.predictor is not None
    predictor = shutil.copytree(kvzap.predictor, tmp_path / "predictor")
    file = predictor / "model.safetensors"
    whole = file.read_bytes()
    assert b'"F32"' in whole
    file.write_bytes(whole.replace(b'"F32"', b'"X32"'))
    with pytest.raises(ValueError, match="model.safetensors is damaged: .* Copy it again."):
        list(convert(kvzap.published, tmp_path / "out", predictor=predictor, threshold=-4.0))
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_what_could_not_be_written(
    dms: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"file/out could not be written, .*: File exists \\({tmp_path}/file\\)"):
        list(convert(dms.published, tmp_path / "file" / "out"))

    def full(source: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="out could not be written, and nothing is left of it: No space left"):
        list(convert(dms.published, tmp_path / "new" / "parents" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "eviction, message",
    [
        ([], r"eviction is \[\]: it must be an object"),
        ({"method": "kvzap"}, "eviction.window is missing: it must be an integer from 1 on"),
        ({"method": "h2o", "window": 4, "shift": 0}, "eviction.method is 'h2o'"),
        (
            {"method": "kvzap", "window": 4, "shift": 0},
            "eviction.threshold is None: it must be a number with method 'kvzap'",
        ),
        (
            {"method": "kvzap", "window": 4, "shift": 0, "threshold": 1, "scale": 2},
            "eviction.scale is 2: it must be null with method 'kvzap'",
        ),
        ({"method": "kvzap", "window": 4, "shift": True, "threshold": 1}, "eviction.shift is True"),
        ({"method": "kvzap", "window": 4, "shift": 0, "threshold": float("nan")}, "eviction.threshold is nan"),
        (
            {"method": "kvzap", "window": 4, "shift": 0, "threshold": 1, "sinks": 4},
            "eviction.sinks is 4: it must be left out because it is unknown",
        ),
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
