"""``vllm-fox inspect``: what it says is what the models, the kernels and vLLM's own specs say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm.v1.kv_cache_interface import FullAttentionSpec

import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the models)
from benchmarks.one_layer import OneLayer
from tests.support.checkpoints import GATE_BIASES, make_checkpoint
from tests.support.checkpoints import VARIANTS as FOX_VARIANTS
from tests.support.evicting import VARIANTS, Made, make_evicting
from tests.support.harness import random_inputs
from tests.support.quantised import PROJECTIONS, quantise
from vllm_fox.cli.facts import Facts, facts_of

from .conftest import Run, documented

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 512,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("evicting"), VARIANTS["qwen3-borrowed"])


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_a_forgetting_transformer(run: Run, fox_tiny: Path) -> None:
    found = run("inspect", fox_tiny, "--tokens", "2048", "8192", "--memory", "10", "--json").json()
    assert (found["layers"], found["query_heads"], found["kv_heads"], found["head_size"]) == (4, 8, 8, 32)
    assert (found["dtype"], found["promise"], found["family"]) == ("bfloat16", "bound", "Forgetting Transformers")
    assert len(found["heads"]) == 32 and found["streams"] == 32 and found["page_size"] == 64
    # A page holds K and V, gates in float32, and the raw k and v of its last token, in whole rows of 128 bytes.
    assert found["page_bytes"] == math.ceil((64 * 32 * 2 * 2 + 64 * 4 + 2 * 32 * 2) / 128) * 128
    assert [row["tokens"] for row in found["requests"]] == [2048, 8192]
    assert found["requests"][1]["dense_bytes"] == 8192 // 64 * 32 * found["page_bytes"]
    assert found["requests"][0]["pruned_bytes_at_most"] is None, "its gates follow the text"
    assert found["memory"]["kv_bytes"] == int((10 * 0.92 - 3) * 2**30 - found["weights_bytes"])
    text = run("inspect", fox_tiny, "--memory", "10")
    assert text.code == 0 and "at most e^-10" in text.out and "`vllm-fox top`" in text.out
    assert "8 of 8 heads follow the text" in text.out


@pytest.mark.parametrize("variant", [{"qk_norm": True}, {"use_rope": True}, {"dialect": "fla", "num_kv_heads": 2}])
def test_thresholds_are_those_of_the_model(tmp_path: Path, variant: dict[str, Any]) -> None:
    """The model for transformers computes them from its own tensors; so does vLLM's, by the same functions."""
    folder = make_checkpoint(tmp_path, dtype=torch.float32, log_pruning_tolerance=-7.0, **variant)
    facts = facts_of(folder, "float32")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, layer in enumerate(model.model.layers):
        wanted = layer.attn.threshold(layer.attn_norm.weight).tolist()
        assert [head.threshold for head in facts.heads if head.layer == index] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("log_f, threshold", [(-0.5, -30.0), (-0.11, -25.3), (-3.0, -20.0), (-0.02, -40.0)])
def test_a_window_is_what_the_kernels_keep(log_f: float, threshold: float) -> None:
    """Pages of a head with constant gates, step by step, against the page count that a request may hold at most."""
    page, length = 16, 400
    facts = _facts(page_size=page, windows=[math.floor(threshold / log_f)] * 2)
    layer = OneLayer(page_size=page, threshold=threshold)
    slot, inputs = layer.open(), random_inputs(length) | {"log_f": torch.full((length, 2, 1), log_f)}
    most = 0
    for start in range(0, length, 8):
        layer.step([(slot, {name: x[start : start + 8] for name, x in inputs.items()})])
        held = len(layer.pool.held_ids(slot, 0))
        limit = facts.pruned_pages(start + 8)
        assert limit is not None and held <= limit
        most = max(most, held)
    # One page a head is for live ranges that were looked at too late, which is not so here.
    assert facts.pruned_pages(length) - 2 <= most + 2  # type: ignore[operator]


def _facts(**fields: Any) -> Facts:
    some: dict[str, Any] = {
        "model_type": "",
        "family": "",
        "layers": 1,
        "query_heads": 2,
        "kv_heads": 2,
        "head_size": 32,
    }
    some |= {
        "dtype": "",
        "longest_context": 4096,
        "promise": "bound",
        "promised": "",
        "streams": 2,
        "page_size": 16,
    }
    return Facts(
        **{**some, "page_bytes": 1, "page_bytes_on": lambda ranks: 1, "weights_bytes": None, "pruned": "", **fields}
    )


def test_constant_gates_prove_windows(run: Run, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, fgate_type="bias_only", qk_norm=True)
    found = run("inspect", folder, "--tokens", "4096", "65536", "--memory", "80", "--json").json()
    first = found["heads"][: len(GATE_BIASES)]
    assert [head["window_at_most"] is None for head in first] == [False, False, False, True]
    assert first[3]["window_at_least"] == found["longest_context"] == 4096
    for head in first[:3]:
        assert head["window_at_least"] == head["window_at_most"]
    row, beyond = found["requests"]
    assert row["pruned_bytes_at_most"] < row["dense_bytes"] and row["pruned_fit_at_least"] > row["dense_fit"]
    assert beyond["pruned_bytes_at_most"] is None, "the bound does not hold so far"
    longer = run("inspect", folder, "--tokens", "65536", "--max-model-len", "65536", "--json").json()
    assert longer["requests"][0]["pruned_bytes_at_most"] < longer["requests"][0]["dense_bytes"]
    assert longer["heads"][0]["threshold"] < found["heads"][0]["threshold"]


def test_heads_that_never_forget(run: Run, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, fgate_type="none", use_rope=True)
    done = run("inspect", folder, "--tokens", "2048")
    assert "no forget gates" in done.out and "as dense" in done.out and "4 of 4 heads never forget" in done.out


def test_a_model_that_drops_tokens(run: Run, dcp_tiny: Path) -> None:
    found = run("inspect", dcp_tiny, "--json").json()
    assert (found["promise"], found["streams"], found["page_size"], found["heads"]) == ("learned", 4, 16, [])
    # K and V of 5 heads of 32, an interaction key of 32, and two positions: of each of 16 tokens.
    assert found["page_bytes"] == math.ceil(16 * (2 * 5 * 32 * 2 + 32 * 2 + 8) / 128) * 128
    assert all(row["pruned_bytes_at_most"] is None for row in found["requests"])
    assert "measure it" in found["pruned"]


def test_a_decoder_that_evicts(run: Run, evicting: Made) -> None:
    found = run("inspect", evicting.served, "--json").json()
    assert (found["promise"], found["window"], found["streams"]) == ("learned", evicting.window, 4)
    assert "training" in found["promised"] and "measure it" in found["pruned"]


def test_a_published_checkpoint_names_its_conversion(run: Run, evicting: Made) -> None:
    done = run("inspect", evicting.published)
    assert done.code == 0 and f"`vllm-fox convert {evicting.published} OUT`" in done.out


def test_a_dense_model(run: Run, llama: Path) -> None:
    """Bytes are those of vLLM's own spec for a layer."""
    found = run("inspect", llama, "--tokens", "1000", "--memory", "24", "--json").json()
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    assert (found["family"], found["promise"], found["weights_bytes"]) == (None, "nothing", None)
    row = found["requests"][0]
    assert row["dense_bytes"] == row["pruned_bytes_at_most"] == math.ceil(1000 / 16) * 3 * spec.page_size_bytes
    assert row["dense_fit"] == found["memory"]["kv_bytes"] // row["dense_bytes"]


def test_json_has_the_documented_keys(run: Run, fox_tiny: Path) -> None:
    found = run("inspect", fox_tiny, "--memory", "10", "--json").json()
    keys = {*found, *found["heads"][0], *found["requests"][0], *found["memory"]}
    assert keys == documented("inspect")


def test_memory_that_is_too_small(run: Run, fox_tiny: Path) -> None:
    done = run("inspect", fox_tiny, "--memory", "3")
    assert done.code == 2 and "--memory is 3" in done.err and "give more" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    "fields, parts",
    [
        ({"model_type": "mamba2"}, ["model_type is 'mamba2'", "not known here", "llama"]),
        ({"model_type": "no_such"}, ["model_type is 'no_such'", "neither"]),
        ({"model_type": "kvzap"}, ["a predictor", "vllm-fox convert"]),
        ({"model_type": "mistral", "sliding_window": 128}, ["sliding_window is 128"]),
        ({"model_type": None}, ["names no model_type"]),
        ({"dtype": "nn"}, ["dtype is 'nn': it must be a floating-point dtype of torch, such as 'bfloat16'."]),
        ({"dtype": None, "torch_dtype": "bf16"}, ["torch_dtype is 'bf16': it must be"]),
        ({"dtype": "int8"}, ["dtype is 'int8': it must be"]),
        ({"dtype": ["float32"]}, ["dtype is ['float32']: it must be"]),
    ],
)
def test_configs_that_cannot_be_told(run: Run, llama: Path, fields: dict[str, Any], parts: list[str]) -> None:
    (llama / "config.json").write_text(json.dumps(LLAMA | fields))
    done = run("inspect", llama)
    assert done.code == 1 and not done.out and done.err.count("\n") == 1
    assert "config.json" in done.err and all(part in done.err for part in parts), done.err


def test_broken_checkpoints(run: Run, fox_tiny: Path, tmp_path: Path) -> None:
    """A field that the family refuses, weights of another model, a file that is cut short, and no config.json."""
    copy = tmp_path / "copy"
    shutil.copytree(fox_tiny, copy)
    config = json.loads((copy / "config.json").read_text())
    for fields, part in (
        ({"windw": 3}, "unknown field windw"),
        ({"num_heads": 4}, "asks for"),
        ({"num_heads": 3}, "num_heads"),
    ):
        (copy / "config.json").write_text(json.dumps(config | fields))
        done = run("inspect", copy)
        assert done.code == 1 and done.err.count("\n") == 1 and part in done.err
    (copy / "config.json").write_text(json.dumps(config))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run("inspect", copy)
    assert done.code == 1 and "model.safetensors is damaged" in done.err and "Copy it again." in done.err
    (copy / "config.json").unlink()
    assert "config.json is missing" in run("inspect", copy).err


def test_a_name_in_the_cache(run: Run, fox_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as the hub's own library does."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--fox-tiny"
    commit = "0" * 40
    shutil.copytree(fox_tiny, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = run("inspect", "someone/fox-tiny", "--json").json()
    assert found["model"] == "someone/fox-tiny" and found["layers"] == 4


@pytest.mark.parametrize("method, bits", [("int8", 8), ("int4", 4), ("gptq", 4)])
def test_quantised_weights_count_as_they_are_stored(tmp_path: Path, method: str, bits: int) -> None:
    """With the bound of a model with QK-norm, which follows from weights that are not quantised."""
    first = make_checkpoint(tmp_path / "first", **FOX_VARIANTS["pro"])
    before = facts_of(first, "bfloat16")
    stored, _ = quantise(first, method, torch.bfloat16)
    found = facts_of(stored)
    projections = sum(
        tensor.numel() for name, tensor in load_file(first / "model.safetensors").items() if PROJECTIONS.match(name)
    )
    assert before.weights_bytes is not None and found.weights_bytes is not None
    saved = (before.weights_bytes - found.weights_bytes) / projections
    # Scales, zeros and indices take some of it: less than a bit of each weight.
    assert 2 - bits / 8 - 1 / 8 < saved < 2 - bits / 8
    assert found.heads == facts_of(first, "bfloat16").heads
    loose, _ = quantise(make_checkpoint(tmp_path / "loose"), method, torch.bfloat16)
    assert not facts_of(loose).heads and "once an engine has loaded" in " ".join(facts_of(loose).notes)


def test_tensors_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    stored, _ = quantise(make_checkpoint(tmp_path / "first", **FOX_VARIANTS["pro"]), "int8", torch.bfloat16)
    weights = load_file(stored / "model.safetensors")
    for part in ("weight", "weight_scale"):
        del weights[f"model.layers.1.mlp.down_proj.{part}"]
    save_file(weights, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        facts_of(stored)
