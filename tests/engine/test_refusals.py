"""What vLLM offers and our models lack: one sentence at start-up, before anything is loaded, and no more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from vllm.config import KVEventsConfig, KVTransferConfig
from vllm.platforms import current_platform

from tests.support.checkpoints import make_checkpoint, save_sparse_gpt2
from tests.support.evicting import VARIANTS, make_evicting
from tests.support.startup import configure, refused
from vllm_fox import config_hook
from vllm_fox.refusals import adapters, unsupported_environment

CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module")
def fox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fox"), qk_norm=True)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without QK-norm the weights bound the logits."""
    return make_checkpoint(tmp_path_factory.mktemp("loose"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sparse_gpt2(tmp_path_factory.mktemp("sparse"), block_size=512)


@pytest.fixture(scope="module")
def evicting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_evicting(tmp_path_factory.mktemp("evicting"), VARIANTS["qwen3-borrowed"]).served


REFUSED: dict[str, dict[str, Any]] = {
    'speculative decoding (--speculative-config) by method "ngram_gpu" (but by "ngram")': {
        "speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}
    },
    "63 num_speculative_tokens in --speculative-config (but up to 62)": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 63}
    },
    "generation by diffusion (--diffusion-config)": {"diffusion_config": {"canvas_length": 8}},
    "classification (--convert classify), as no weights are loaded for it": {
        "runner": "pooling",
        "convert": "classify",
    },
    "routed experts (--enable-return-routed-experts)": {"enable_return_routed_experts": True},
    "a KV connector (--kv-transfer-config)": {"kv_transfer_config": CONNECTOR},
    "KV offloading (--kv-offloading-size 1.5; fox.host_cache_gib keeps cached pages in host memory)": {
        "kv_offloading_size": 1.5
    },
    "weights in CPU memory (--cpu-offload-gb 0.5)": {"cpu_offload_gb": 0.5},
    "weights in CPU memory (--offload-group-size 2)": {"offload_group_size": 2},
    "layers without float8 pages (--kv-cache-dtype-skip-layers 0 1)": {
        "kv_cache_dtype": "fp8",
        "kv_cache_dtype_skip_layers": ["0", "1"],
    },
    "--kv-cache-dtype fp8_e5m2 (but auto, fp8, fp8_e4m3)": {"kv_cache_dtype": "fp8_e5m2"},
    "--kv-cache-dtype bfloat16 (but auto, fp8, fp8_e4m3)": {"kv_cache_dtype": "bfloat16"},
    "--kv-cache-dtype int8_per_token_head (but auto, fp8, fp8_e4m3)": {"kv_cache_dtype": "int8_per_token_head"},
    "KV events (enable_kv_cache_events in --kv-events-config), since no block is cached": {
        "kv_events_config": KVEventsConfig(enable_kv_cache_events=True)
    },
    "residency of blocks (--kv-cache-metrics), since their pages are no blocks": {"kv_cache_metrics": True},
    "estimates of work (--enable-mfu-metrics), since they count what is forgotten": {"enable_mfu_metrics": True},
    "states of Mamba layers (--mamba-cache-mode align)": {"mamba_cache_mode": "align"},
    "cached prefixes (--prefix-match-unit 32)": {"prefix_match_unit": 32},
    "cached prefixes (--prefix-cache-retention-interval 64)": {"prefix_cache_retention_interval": 64},
    "an attention backend other than their own (--attention-backend FLASH_ATTN)": {
        "attention_backend": "FLASH_ATTN"
    },
    "an attention backend other than their own (--attention-backend CPU_ATTN)": {
        "attention_config": {"backend": "CPU_ATTN"}
    },
    "attention backends other than their own (backend_per_kind {full_attention: FLEX_ATTENTION} in "
    "--attention-config)": {"attention_config": {"backend_per_kind": {"full_attention": "FLEX_ATTENTION"}}},
    "attention to later tokens (use_non_causal in --attention-config)": {
        "attention_config": {"use_non_causal": True}
    },
    "fusion of attention with quantisation (fuse_attn_quant in --compilation-config)": {
        "compilation_config": {"pass_config": {"fuse_attn_quant": True}}
    },
    "context parallelism (--decode-context-parallel-size 2)": {"decode_context_parallel_size": 2, **TWO_RANKS},
    "context parallelism (--prefill-context-parallel-size 2)": {
        "prefill_context_parallel_size": 2,
        "distributed_executor_backend": "mp",
    },
    "two half batches at once (--enable-dbo)": {"enable_dbo": True},
    "parts of a batch at once (--ubatch-size 2)": {"ubatch_size": 2},
    "2 ranks under --distributed-executor-backend external_launcher": {
        **TWO_RANKS,
        "distributed_executor_backend": "external_launcher",
    },
}
"""What a model lacks, as the error says it, and the options that ask for it."""


@pytest.mark.parametrize("what", REFUSED)
def test_options(fox: Path, what: str) -> None:
    sentence = f"In vllm-fox, Forgetting Transformers do not support {what}: leave it out."
    assert sentence in refused(fox, **REFUSED[what])


def test_speculation_by_family(sparse: Path) -> None:
    """A family says whether rejected drafts can be taken back."""
    what = "speculative decoding (--speculative-config), since what a rejected draft drops cannot be undone"
    sentence = f"In vllm-fox, Sparse GPT-2 models do not support {what}: leave it out."
    assert sentence in refused(sparse, speculative_config={"method": "ngram", "num_speculative_tokens": 2})


QUANTISED: dict[str, dict[str, Any]] = {
    "quantised weights (--quantization fp8)": {"quantization": "fp8", "dtype": "bfloat16"},
    "quantised weights (--quantization fp8_per_tensor)": {"quantization": "fp8_per_tensor", "dtype": "bfloat16"},
    "quantised weights (--quantization-config)": {
        "quantization_config": {"linear": "fp8_per_tensor"},
        "dtype": "bfloat16",
    },
}


@pytest.mark.parametrize("what", QUANTISED)
def test_quantised_weights_by_family(fox: Path, sparse: Path, evicting: Path, what: str) -> None:
    """A family says whether vLLM's own linear layers have all of its weights that may be quantised."""
    sentence = f"In vllm-fox, Sparse GPT-2 models do not support {what}: leave it out."
    assert sentence in refused(sparse, **QUANTISED[what])
    both = QUANTISED["quantised weights (--quantization-config)"] | {"quantization": "online"}
    for model in (fox, evicting):
        if "quantization" in QUANTISED[what]:
            assert configure(model, **QUANTISED[what]).quant_config is not None
        else:
            ignored = "--quantization-config without --quantization (vLLM would ignore it): leave it out."
            assert f"do not support {ignored}" in refused(model, **QUANTISED[what])
        assert configure(model, **both).quant_config is not None


ADAPTERS = "LoRA (--enable-lora)"


def test_adapters_by_family_and_device(
    fox: Path, loose: Path, sparse: Path, evicting: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence = f"In vllm-fox, Sparse GPT-2 models do not support {ADAPTERS}: leave it out."
    assert sentence in refused(sparse, enable_lora=True)
    mixed = "LoRA (--enable-lora) on a CPU, where other requests would get it too: leave it out."
    for model, family in ((evicting, "Decoders that evict tokens"), (fox, "Forgetting Transformers")):
        assert f"In vllm-fox, {family} do not support {mixed}" in refused(model, enable_lora=True)
    with monkeypatch.context() as patched:
        patched.setattr(config_hook, "adapters", lambda *_: ())
        without = f"{ADAPTERS} without QK-norm, as adapters change what bounds pruning: leave it out."
        assert f"In vllm-fox, Forgetting Transformers do not support {without}" in refused(loose, enable_lora=True)
        shared = make_checkpoint(tmp_path, "fla", num_kv_heads=1, qk_norm=True)
        ranks = f"{ADAPTERS} with --tensor-parallel-size 2 and 1 KV heads: leave it out."
        assert f"do not support {ranks}" in refused(shared, enable_lora=True, **TWO_RANKS)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    for dtype, refusals in ((torch.float16, 0), (torch.float32, 1)):
        on_a_gpu: Any = SimpleNamespace(lora_config=object(), model_config=SimpleNamespace(dtype=dtype))
        found = [what for found, what in adapters(on_a_gpu, supported=True) if found]
        assert found == ["LoRA (--enable-lora) with --dtype float32"][:refusals]


REFUSED_VARIABLES = {
    "batch invariance (VLLM_BATCH_INVARIANT=1)": ("VLLM_BATCH_INVARIANT", "1"),
    "breakable CUDA graphs (VLLM_USE_BREAKABLE_CUDAGRAPH=1)": ("VLLM_USE_BREAKABLE_CUDAGRAPH", "1"),
    "another layout of the KV cache (VLLM_KV_CACHE_LAYOUT=NHD)": ("VLLM_KV_CACHE_LAYOUT", "NHD"),
    "expandable segments of GPU memory (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)": (
        "PYTORCH_CUDA_ALLOC_CONF",
        "expandable_segments:True",
    ),
    "expandable segments of GPU memory (PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64,expandable_segments:True)": (
        "PYTORCH_CUDA_ALLOC_CONF",
        "max_split_size_mb:64,expandable_segments:True",
    ),
}


@pytest.mark.parametrize("what", REFUSED_VARIABLES)
def test_environment(fox: Path, sparse: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(*REFUSED_VARIABLES[what])
    for model, family in ((fox, "Forgetting Transformers"), (sparse, "Sparse GPT-2 models")):
        assert f"In vllm-fox, {family} do not support {what}: leave it out." in refused(model)


def test_expandable_segments_by_their_newer_name(fox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of GPU memory, so on a CPU they are as harmless as vLLM finds them."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    config = configure(fox)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    (what,) = [what for found, what in unsupported_environment(config) if found]
    assert what == "expandable segments of GPU memory (PYTORCH_ALLOC_CONF=expandable_segments:True)"
    # vLLM's allocator for sleep mode switches them off where the KV cache is.
    config.model_config.enable_cumem_allocator = True
    assert not [what for found, what in unsupported_environment(config) if found]


def test_rounded_products_need_a_bound_that_does_not_follow_from_them(
    loose: Path, fox: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_FLOAT32_MATMUL_PRECISION", "high")
    what = "rounded float32 products without QK-norm (VLLM_FLOAT32_MATMUL_PRECISION=high)"
    assert f"In vllm-fox, Forgetting Transformers do not support {what}: leave it out." in refused(loose)
    configure(loose, dtype="bfloat16")
    configure(fox)
    configure(sparse)


def test_a_table_of_positions_ends_the_context(fox: Path, sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM can be told to let longer requests in; a model without such a table can take them."""
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in refused(sparse, max_model_len=1024)
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    what = "--max-model-len 1024 (but up to 512, the length of their table of positions)"
    assert f"In vllm-fox, Sparse GPT-2 models do not support {what}: leave it out." in refused(
        sparse, max_model_len=1024
    )
    assert configure(fox, max_model_len=8192).model_config.max_model_len == 8192


@pytest.mark.parametrize(
    "override, message",
    [
        ({"rope_theta": 1e6}, "unknown field rope_theta (value 1000000.0): remove it; the fields are"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "unknown field rope_parameters (value {'rope_type': 'linear', 'factor': 2.0}): remove it",
        ),
        ({"sliding_window": 64}, "unknown field sliding_window (value 64)"),
        ({"window_size": 64}, "window_size is 64: it must be null"),
        ({"is_causal": False}, "is_causal is False: only True is supported"),
        ({"num_experts": 4}, "unknown field num_experts (value 4)"),
        ({"num_heads": 3}, "num_heads is 3: it must be a divisor of hidden_size (128)"),
    ],
)
def test_overrides_that_would_change_nothing(fox: Path, override: dict[str, Any], message: str) -> None:
    """vLLM writes them into the config after the config has checked its fields."""
    found = refused(fox, hf_overrides=override)
    assert "--hf-overrides: forgetting_transformer-project_fox config: " in found and message in found


def test_overrides_by_a_function(sparse: Path) -> None:
    def scale_rope(config: PretrainedConfig) -> PretrainedConfig:
        config.update({"rope_theta": 1e6})
        return config

    message = refused(sparse, hf_overrides=scale_rope)
    assert "--hf-overrides: sparse_gpt2 config: unknown field rope_theta (value 1000000.0): remove it" in message


HARMLESS: list[dict[str, Any]] = [
    {"attention_backend": "auto"},
    {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"},
    {"kv_cache_dtype_skip_layers": ["0"]},
    {"kv_events_config": KVEventsConfig()},
    {"distributed_executor_backend": "external_launcher"},
    {"hf_overrides": {"max_position_embeddings": 600}},
    {"ubatch_size": 1},
]


@pytest.mark.parametrize("options", HARMLESS, ids=str)
def test_values_that_ask_for_nothing(fox: Path, options: dict[str, Any]) -> None:
    assert configure(fox, **options).cache_config.block_size == 64


@pytest.mark.parametrize(
    "variable",
    [
        ("VLLM_BATCH_INVARIANT", "0"),
        ("VLLM_USE_BREAKABLE_CUDAGRAPH", "0"),
        ("VLLM_KV_CACHE_LAYOUT", "BLHNC"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False"),
    ],
    ids=str,
)
def test_variables_that_ask_for_nothing(
    fox: Path, variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    configure(fox)
