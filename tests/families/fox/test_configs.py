"""Both config classes: what they read, what they refuse, and what they tell vLLM and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from tests.support.checkpoints import FIXED_GATE, PRO, VARIANTS, make_config
from vllm_fox.families.fox.architecture import Architecture
from vllm_fox.families.fox.config import FlaForgettingTransformerConfig, FoxConfig
from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config
from vllm_fox.registration import register_configs


def _write(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_configs_describe_the_same_model(name: str, tmp_path: Path) -> None:
    register_configs()
    variant = {key: value for key, value in VARIANTS[name].items() if key != "shards"}
    config = make_config(**variant)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert Architecture.from_config(loaded) == Architecture.from_config(config)


def test_official_fields_become_the_architecture() -> None:
    config = FoxConfig(hidden_size=384, num_heads=6, norm_eps=1e-3, log_pruning_tolerance=-8, **PRO)
    arch = Architecture.from_config(config)
    assert (arch.dialect, arch.head_dim, arch.num_kv_heads) == ("official", 64, 6)
    assert (arch.gate, arch.qk_norm, arch.output_gate, arch.output_norm) == (
        "full",
        "per_head",
        "sigmoid",
        True,
    )
    assert (arch.k_shift, arch.v_shift, arch.rope_base, arch.qkv_bias) == (True, True, None, False)
    assert (arch.norm_eps, arch.qk_norm_eps, arch.log_pruning_tolerance) == (1e-3, 1e-5, -8)
    assert Architecture.from_config(FoxConfig(use_rope=True, rope_base=10.0)).rope_base == 10.0


def test_official_configs_are_saved_as_the_official_code_reads_them() -> None:
    assert FoxConfig(num_heads=8, hidden_size=256).to_dict()["num_kv_heads"] is None


def test_fla_fields_become_the_architecture() -> None:
    arch = Architecture.from_config(
        FlaForgettingTransformerConfig(num_kv_heads=8, qkv_bias=True, qk_norm=True, use_output_gate=True)
    )
    assert (arch.dialect, arch.num_heads, arch.num_kv_heads, arch.head_dim) == ("fla", 32, 8, 64)
    assert (arch.qkv_bias, arch.qk_norm, arch.output_gate, arch.output_norm) == (
        True,
        "per_head",
        "sigmoid",
        False,
    )


@pytest.mark.parametrize(
    "fields, size",
    [
        ({"hidden_size": 384, "num_heads": 6, "hidden_ratio": 3.5}, 1024),
        ({"hidden_size": 768, "num_heads": 12, "hidden_ratio": 3.5}, 1792),
        ({"hidden_size": 1536, "num_heads": 24, "hidden_ratio": 4}, 4096),
        ({"hidden_size": 1536, "num_heads": 24, "hidden_ratio": None}, 4096),
        ({"hidden_size": 1536, "num_heads": 24, "intermediate_size": 1000}, 1000),
    ],
)
def test_intermediate_size_follows_the_official_rule(fields: dict[str, Any], size: int) -> None:
    config = FoxConfig(**fields)
    assert config.intermediate_size == size
    assert Architecture.from_config(config).intermediate_size == size


def test_the_names_that_vllm_reads() -> None:
    config = FlaForgettingTransformerConfig(hidden_size=256, num_heads=8, num_kv_heads=2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 2, 32)
    assert config.max_position_embeddings == 2048
    assert FoxConfig(hidden_size=256, num_heads=8).num_key_value_heads == 8


def test_no_trust_remote_code_is_needed_and_ours_wins(tmp_path: Path) -> None:
    class Foreign(PretrainedConfig):
        model_type = "forgetting_transformer"

    AutoConfig.register("forgetting_transformer", Foreign, exist_ok=True)
    register_configs()
    register_configs()
    _write(tmp_path, model_type="forgetting_transformer", num_heads=16, torch_dtype="bfloat16")
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, FlaForgettingTransformerConfig)
    assert (config.num_heads, str(config.dtype)) == (16, "torch.bfloat16")


def test_fields_of_older_transformers_are_no_mistake(tmp_path: Path) -> None:
    register_configs()
    fields = {"transformers_version": "4.44.0", "torch_dtype": "float32", "use_bfloat16": False, "top_k": 50}
    _write(tmp_path, model_type=FoxConfig.model_type, _name_or_path="somewhere", tokenizer_class=None, **fields)
    assert AutoConfig.from_pretrained(tmp_path).num_heads == 32


def test_fields_that_change_nothing_are_no_mistake() -> None:
    """What a training writes, other names that agree, and unknown fields that ask for nothing."""
    config = FoxConfig(dropout=0.1, num_attention_heads=32, head_dim=64, num_key_value_heads=32, of_tomorrow=False)
    assert (config.num_heads, config.head_dim) == (32, 64)
    sparse = SparseGPT2Config(n_positions=1024, max_position_embeddings=1024, attn_pdrop=0.1, n_inner=None)
    assert sparse.block_size == 1024
    others = {"n_positions": 2048, "activation_function": "relu", "scale_attn_weights": False, "n_inner": 5}
    for name, value in others.items():
        with pytest.raises(ValueError, match=name):
            SparseGPT2Config(**{name: value})


OFFICIAL_MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"hiden_size": 64}, "hiden_size", "did you mean hidden_size"),
    ({"sliding_window": 64}, "sliding_window", "unknown field"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder is True", "leave it out"),
    ({"add_cross_attention": True}, "add_cross_attention is True", "leave it out"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads is", "leave it out"),
    ({"per_layer_config": {"0": {"num_heads": 4}}}, "per_layer_config is", "leave it out"),
    ({"hidden_ratio": 1e-9}, "hidden_ratio is 1e-09", "greater"),
    ({"head_dim": 128}, "head_dim is 128", "follows from others and is 64"),
    ({"num_attention_heads": 16}, "num_attention_heads is 16", "give num_heads alone"),
    ({"is_causal": False}, "is_causal is False", "only True"),
    ({"num_heads": 0}, "num_heads is 0", "it must be an integer from 1 on"),
    ({"hidden_size": None}, "hidden_size is None", "it must be an integer from 1 on"),
    ({"vocab_size": "x"}, "vocab_size is 'x'", "it must be an integer from 1 on"),
    ({"vocab_size": 0}, "vocab_size", "it must be an integer from 1 on"),
    ({"num_hidden_layers": "12"}, "num_hidden_layers", "'12'"),
    ({"max_position_embeddings": None}, "max_position_embeddings", "it must be an integer from 1 on"),
    ({"num_heads": 7}, "num_heads is 7", "a divisor of hidden_size (2048)"),
    ({"num_heads": 128}, "num_heads is 128", "is 32, 64, 128 or 256, and not 16"),
    ({"num_kv_heads": 8}, "num_kv_heads is 8", "null or num_heads (32)"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'", "'swish', 'silu' or 'sigmoid'"),
    ({"window_size": 512}, "window_size is 512", "null"),
    ({"elementwise_affine": False}, "elementwise_affine is False", "true"),
    ({"norm_eps": 0}, "norm_eps is 0", "positive number"),
    ({"hidden_ratio": -1}, "hidden_ratio is -1", "positive number"),
    ({"attention_bias": True}, "attention_bias is True", "no biases"),
    ({"use_rope": "yes"}, "use_rope is 'yes'", "true or false"),
    ({"ogate_act": "relu"}, "ogate_act is 'relu'", "'sigmoid' or 'silu'"),
    (
        {"use_output_gate": True, "use_output_norm": True, "ogate_act": "silu"},
        "ogate_act",
        "must be 'sigmoid'",
    ),
    (
        {"qk_norm_share_param_across_head": True},
        "qk_norm_share_param_across_head is True",
        "qk_norm is false",
    ),
    ({"fgate_type": "data"}, "fgate_type is 'data'", "'full', 'bias_only', 'fixed' or 'none'"),
    ({"fgate_type": "fixed"}, "fgate_bias_init is False", "true with fgate_type 'fixed'"),
    (FIXED_GATE, "fgate_bias_init is True", "false with fgate_type 'full'"),
    (
        {"fgate_type": "fixed", **FIXED_GATE, "decay_time_min": None},
        "decay_time_min is None",
        "positive number",
    ),
    ({"fgate_type": "fixed", **FIXED_GATE, "decay_time_max": -1}, "decay_time_max is -1", "positive number"),
    ({"fgate_type": "bias_only", "decay_time_min": 1.0}, "decay_time_min is 1.0", "null"),
    ({"log_pruning_tolerance": 0.5}, "log_pruning_tolerance is 0.5", "negative number"),
    ({"log_pruning_tolerance": float("-inf")}, "log_pruning_tolerance is -inf", "negative number"),
]
FLA_MISTAKES: list[tuple[dict[str, Any], str, str]] = [
    ({"use_k_shift": True}, "use_k_shift", "unknown field"),
    ({"num_kv_heads": 5}, "num_kv_heads is 5", "a divisor of num_heads (32)"),
    ({"hidden_act": "powlu"}, "hidden_act is 'powlu'", "'swish' or 'silu'"),
    ({"attnres_block_size": 1}, "attnres_block_size is 1", "null"),
    ({"window_size": 512}, "window_size is 512", "null"),
    ({"qkv_bias": 1}, "qkv_bias is 1", "true or false"),
]


@pytest.mark.parametrize(
    "kind, fields, names, allows",
    [(FoxConfig, *case) for case in OFFICIAL_MISTAKES]
    + [(FlaForgettingTransformerConfig, *case) for case in FLA_MISTAKES],
)
def test_mistakes_name_the_field_and_the_fix(kind: type, fields: dict[str, Any], names: str, allows: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**fields)
    message = str(caught.value)
    assert message.startswith(kind.model_type)
    assert names in message and allows in message


def test_a_field_changed_later_is_checked_when_the_model_is_built() -> None:
    config = FoxConfig()
    config.update({"num_attention_heads": 24})
    with pytest.raises(ValueError, match="num_heads is 24: it must be a divisor of hidden_size"):
        Architecture.from_config(config)
