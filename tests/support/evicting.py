"""Tiny random checkpoints that evict tokens, in the forms in which they are published."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.checkpoints import VOCAB_SIZE, save_tokenizer
from vllm_fox.families.evicting.convert import convert

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Variant:
    """A kind of checkpoint.

    Attributes:
        base: ``model_type`` of the dense model.
        method: "borrowed", "adapter", "linear" or "mlp".
        window: W.
        config: fields of the base's config.
        dms: fields of DMS.
    """

    base: str
    method: str
    window: int = 40
    config: dict[str, Any] = field(default_factory=dict)
    dms: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    "qwen3-borrowed": Variant("qwen3", "borrowed"),
    "llama-adapter": Variant(
        "llama",
        "adapter",
        window=17,
        config={
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": LLAMA3_ROPE,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-linear": Variant("qwen2", "linear"),
    "mistral-mlp": Variant("mistral", "mlp", window=1, config={"sliding_window": None, "num_key_value_heads": 4}),
    "qwen3-layer": Variant("qwen3", "borrowed", config={"num_attention_heads": 8}, dms={"dms_alpha_per": "layer"}),
    "llama-disabled": Variant("llama", "borrowed", dms={"dms_disable_eviction": True}),
}
THRESHOLD = 0.3
"""Of predictors: most scores are lower."""


@dataclass(frozen=True)
class Made:
    """A checkpoint as published, and as it is served.

    Attributes:
        published: folder of the model.
        predictor: folder of KVzap's predictor, or None.
        served: folder that the conversion has made.
        window: W.
    """

    published: Path
    predictor: Path | None
    served: Path
    window: int


def make_evicting(folder: Path, variant: Variant, **config_fields: Any) -> Made:
    """Write a checkpoint of random weights, of which most tokens are evicted, and convert it."""
    torch.manual_seed(0)
    sizes = SIZES | variant.config | config_fields
    if variant.base == "qwen2":
        del sizes["head_dim"]  # Qwen2 has no such field
    published = folder / "published"
    config: Any = AutoConfig.for_model(variant.base, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.named_parameters():
        scale = 0.25 if tensor.ndim == 2 else 0.1
        tensor.data.copy_(torch.randn_like(tensor) * scale + ("norm" in name))
    model.save_pretrained(published)
    save_tokenizer(published)
    heads, size, layers = config.num_key_value_heads, config.hidden_size, config.num_hidden_layers
    if variant.method in ("linear", "mlp"):
        predictor = folder / "predictor"
        _save_predictor(predictor, layers, size, heads, 24 if variant.method == "mlp" else None)
        return _converted(Made(published, predictor, folder / "served", variant.window))
    given = json.loads((published / "config.json").read_text())
    dms = {
        "dms_alpha_scale": 50.0,
        # A negative offset lets most tokens go.
        "dms_initial_alpha_offset": -20.0,
        "dms_window_size": variant.window,
        "dms_separate_alpha": variant.method == "adapter",
        "dms_cr": 8,
        "dms_tau": 0.1,
        **variant.dms,
    }
    del given["architectures"]  # as Model-Optimizer does
    (published / "config.json").write_text(json.dumps(given | dms))
    if variant.method == "adapter":
        tensors = load_file(published / "model.safetensors")
        for n in range(layers):
            name = f"model.layers.{n}.self_attn.dms_proj_alpha"
            tensors[f"{name}.weight"] = torch.randn(heads, size) * 0.1
            tensors[f"{name}_norm.weight"] = 1 + torch.randn(size) * 0.1
            if config.attention_bias:
                tensors[f"{name}.bias"] = torch.randn(heads) * 0.1
        save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    return _converted(Made(published, None, folder / "served", variant.window))


def _save_predictor(folder: Path, layers: int, size: int, heads: int, hidden: int | None) -> None:
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    parts = {"": (heads, size)} if hidden is None else {".0": (hidden, size), ".2": (heads, hidden)}
    for n in range(layers):
        for part, (outer, inner) in parts.items():
            tensors[f"layers.{n}{part}.weight"] = torch.randn(outer, inner) / inner**0.5
            tensors[f"layers.{n}{part}.bias"] = torch.randn(outer) * 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "kvzap",
        "input_dim": size,
        "output_dim": heads,
        "hidden_dim": hidden,
        "n_modules": layers,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _converted(made: Made) -> Made:
    options: dict[str, Any] = {}
    if made.predictor is not None:
        options = {"predictor": made.predictor, "threshold": THRESHOLD, "window": made.window}
    list(convert(made.published, made.served, **options))
    return made
