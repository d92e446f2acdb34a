"""What the engine says and sets at start-up: one clear error for a mistake, our settings where vLLM reads them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.engines import engine, generate, greedy, manager, source_tokens
from tests.support.checkpoints import PRO, make_checkpoint, save_sparse_gpt2
from tests.support.startup import configure, refused
from vllm_fox.compat import check_vllm_version


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("startup"), qk_norm=True)


@pytest.mark.parametrize(
    "fox, message",
    [
        ({"pagesize": 32}, "fox.pagesize is not an option; the options are release, page_size, "),
        ({"page_size": 48}, "fox.page_size is 48: it must be one of 16, 32, 64, 128, 256, or null."),
        ({"page_size": "64"}, "fox.page_size is '64': it must be one of"),
        ({"page_size": True}, "fox.page_size is True: it must be one of"),
        ({"log_pruning_tolerance": 3}, "fox.log_pruning_tolerance is 3: it must be a negative number"),
        ({"log_pruning_tolerance": "low"}, "fox.log_pruning_tolerance is 'low': it must be a negative number"),
        ({"log_pruning_tolerance": "checkpoint"}, "fox.log_pruning_tolerance is 'checkpoint': it must be"),
        ({"log_pruning_tolerance": float("nan")}, "fox.log_pruning_tolerance is nan: it must be"),
        ({"log_pruning_tolerance": float("-inf")}, "fox.log_pruning_tolerance is -inf: it must be"),
        ({"release": "no"}, "fox.release is 'no': it must be true or false."),
        ({"host_cache_gib": -1}, "fox.host_cache_gib is -1: it must be 0 or a positive number."),
        ({"host_cache_gib": 1e6}, "fox.host_cache_gib is 1e+06, but this machine has "),
        (["page_size"], "\"fox\" in additional_config is ['page_size']: it must be an object of options."),
    ],
)
def test_bad_settings(tiny: Path, fox: Any, message: str) -> None:
    assert message in refused(tiny, fox)


def test_host_memory_needs_a_cache(tiny: Path) -> None:
    message = refused(tiny, {"host_cache_gib": 0.5}, enable_prefix_caching=False)
    assert "fox.host_cache_gib is 0.5, but prefix caching is off, so there are no cached pages: leave" in message
    assert configure(tiny, {"host_cache_gib": 0.5}).cache_config.enable_prefix_caching


def test_block_size_is_ours(tiny: Path) -> None:
    """``--block-size`` is answered with the option to use; the same number by both names is no mistake."""
    message = refused(tiny, block_size=32)
    assert "--block-size 32 is not used" in message and '"page_size": 32' in message
    assert configure(tiny, {"page_size": 32}, block_size=32).cache_config.block_size == 32


def test_a_stage_has_a_layer(tiny: Path) -> None:
    message = refused(tiny, pipeline_parallel_size=9, distributed_executor_backend="mp")
    assert "--pipeline-parallel-size 9" in message and "choose at most" in message


@pytest.mark.parametrize("ranks", [3, 8])
def test_tensor_parallel_size_must_divide_the_heads(tiny: Path, ranks: int) -> None:
    """Uneven shares, and more ranks than heads."""
    message = refused(tiny, tensor_parallel_size=ranks, distributed_executor_backend="mp")
    assert str(ranks) in message and "4" in message and "divi" in message
    print(message)


def test_ranks_that_do_not_divide_the_kv_heads(tmp_path: Path) -> None:
    """Query heads can be split in four, but three KV heads cannot, not even with copies."""
    model = make_checkpoint(tmp_path, "fla", hidden_size=384, num_heads=12, num_kv_heads=3, qk_norm=True)
    message = refused(model, tensor_parallel_size=4, distributed_executor_backend="mp")
    assert "--tensor-parallel-size 4 does not divide the model's 3 KV heads: choose a divisor or" in message


def test_page_size_becomes_the_block_size(tiny: Path) -> None:
    assert configure(tiny).cache_config.block_size == 64
    assert configure(tiny, {"page_size": 128}).cache_config.block_size == 128


@pytest.mark.parametrize(
    "fox, tolerance, release",
    [({}, -7.0, True), ({"log_pruning_tolerance": -3, "release": False, "page_size": 32}, -3.0, False)],
)
def test_settings_reach_layers_and_pool(
    fox: dict[str, Any], tolerance: float, release: bool, tmp_path: Path
) -> None:
    """An option wins over the checkpoint's tolerance, which wins over the default."""
    model = make_checkpoint(tmp_path, qk_norm=True, log_pruning_tolerance=-7.0)
    with engine(model, fox, max_model_len=512, num_gpu_blocks_override=40) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert [layer.tolerance for layer in layers] == [tolerance] * 2
        # -2U - log L + log eps with U > 0: pruning is on, and no laxer than asked for.
        assert all((layer.threshold < tolerance - math.log(512)).all() for layer in layers)
        spec = manager(llm).kv_cache_spec
        assert (spec.block_size, spec.release) == (fox.get("page_size", 64), release)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse_gpt2(tmp_path_factory.mktemp("sparse"), block_size=512)


def test_sparse_gpt2_is_set_up_like_the_rest(sparse: Path) -> None:
    config = configure(sparse)
    assert config.cache_config.block_size == 16
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_connector == "FoxPageConnector"
    assert "vllm_fox::paged_attention" in (config.compilation_config.splitting_ops or [])


@pytest.mark.parametrize(
    "fox, options, what",
    [
        (None, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 (but auto)"),
        (None, {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "--pipeline-parallel-size 2"),
    ],
)
def test_what_sparse_gpt2_lacks(sparse: Path, fox: Any, options: dict[str, Any], what: str) -> None:
    message = refused(sparse, fox, **options)
    assert "Sparse GPT-2 models do not support" in message and what in message and "leave it out" in message


def test_an_option_of_another_family_is_unknown(sparse: Path) -> None:
    """Models that have learned what to drop have no bound to prune by."""
    message = refused(sparse, {"log_pruning_tolerance": -5})
    known = "release, page_size, poison_free_pages, host_cache_gib."
    assert f"fox.log_pruning_tolerance is not an option; the options are {known}" in message


def test_bad_sparse_gpt2(tmp_path: Path) -> None:
    """A field of its config, then a tensor that its config does not fit."""
    file = save_sparse_gpt2(tmp_path) / "config.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps(good | {"n_head": 5}))
    assert "n_head is 5: it must be a divisor of n_embd (32)" in refused(tmp_path)
    file.write_text(json.dumps(good | {"int_n_embd": 4}))
    with pytest.raises(ValueError) as caught, engine(tmp_path, max_model_len=64):
        pass
    assert "tensor transformer.h.0.attn.q_int.weight is [8, 32], expected [4, 32]" in str(caught.value)
    # transformers would serve the head, vLLM the embeddings.
    file.write_text(json.dumps(good))
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"] / 2}, tmp_path / "model.safetensors")
    message = "lm_head.weight differs from transformer.wte.weight"
    with pytest.raises(ValueError, match=message), engine(tmp_path, max_model_len=64):
        pass


@pytest.mark.parametrize("asked", [None, True, False])
def test_prefix_caching_is_on_unless_switched_off(tiny: Path, asked: bool | None) -> None:
    assert configure(tiny, enable_prefix_caching=asked).cache_config.enable_prefix_caching is (asked is not False)


def test_prefix_caching_is_off_where_pages_change(dcp_tiny: Path) -> None:
    """Compaction moves tokens of a sparse GPT-2 between pages that are full already."""
    assert configure(dcp_tiny, enable_prefix_caching=True).cache_config.enable_prefix_caching is False


def test_pages_travel_through_our_connector(tiny: Path) -> None:
    """Set without a flag; the user's own dtype for the KV cache is fine if it is the model's."""
    config = configure(tiny, dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_connector == "FoxPageConnector"
    assert "vllm_fox::paged_attention" in (config.compilation_config.splitting_ops or [])


def test_float8_pages(tmp_path: Path) -> None:
    """Also on a CPU. A number has 3 bits after its first, and what that costs averages out over a text."""
    found = {}
    for kind in ("auto", "fp8"):
        with engine(
            make_checkpoint(tmp_path, **PRO), dtype="bfloat16", max_model_len=512, kv_cache_dtype=kind
        ) as llm:
            tokens = source_tokens(llm, 400)
            (out,) = generate(llm, [tokens], greedy(1, prompt_logprobs=0))
            given = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
            found[kind] = sum(given) / len(given), manager(llm).kv_cache_spec.page_format.page_bytes
    (plain, whole), (rounded, half) = found["auto"], found["fp8"]
    assert rounded == pytest.approx(plain, abs=0.02) and rounded != plain
    assert half < 0.56 * whole


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_head": 4}, "unknown field num_head (value 4): did you mean num_heads?"),
        ({"fgate_type": "half"}, "fgate_type is 'half': it must be 'full', 'bias_only', 'fixed' or 'none'"),
        ({"window_size": 64}, "window_size is 64: it must be null"),
        ({"num_heads": 3}, "num_heads is 3: it must be a divisor of hidden_size (128)"),
        ({"log_pruning_tolerance": 1.0}, "log_pruning_tolerance is 1.0: it must be null or a negative number"),
    ],
)
def test_bad_model_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = make_checkpoint(tmp_path)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert message in refused(model)


@pytest.mark.parametrize(
    "broken, message",
    [
        (
            {"drop": ("model.layers.1.attn.q_norm.weight",)},
            "missing tensor model.layers.1.attn.q_norm.weight, expected [128]",
        ),
        (
            {"extra": {"model.layers.0.attn.g_proj.weight": torch.zeros(128, 128)}},
            "unexpected tensor model.layers.0.attn.g_proj.weight [128, 128]",
        ),
        (
            {"extra": {"model.layers.0.attn.fgate_proj.bias": torch.zeros(5)}},
            "tensor model.layers.0.attn.fgate_proj.bias is [5], expected [4]",
        ),
    ],
)
def test_bad_weights(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    """A whole engine is started, and ends in the loader's message."""
    model = make_checkpoint(tmp_path, qk_norm=True, **broken)
    with pytest.raises(ValueError) as caught, engine(model, max_model_len=512):
        pass
    assert "do not fit its config.json (official dialect)" in str(caught.value)
    assert message in str(caught.value)


def test_a_pool_too_small_for_one_request(tiny: Path) -> None:
    """vLLM's own check holds for requests that never forget: 512 tokens need 32 pages of 16 in every stream."""
    with (
        pytest.raises(ValueError, match="max_model_len|max seq len"),
        engine(tiny, {"page_size": 16}, max_model_len=512, num_gpu_blocks_override=20),
    ):
        pass


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.3.2", "unknown"])
def test_other_vllm_versions(version: str) -> None:
    with pytest.raises(RuntimeError, match=f"vLLM 0.32.x and 0.33.x, but vLLM {version} is installed. Install"):
        check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.32.0rc1", "0.32.1+cpu", "0.33.0"])
def test_supported_vllm_versions(version: str) -> None:
    check_vllm_version(version)
