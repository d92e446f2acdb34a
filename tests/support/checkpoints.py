"""Tiny random checkpoints of every variant, complete enough for the real engine to serve text from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vllm_fox.families.fox.architecture import Architecture, expected_weights
from vllm_fox.families.fox.config import FlaForgettingTransformerConfig, FoxConfig
from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config
from vllm_fox.hf import SparseGPT2LMHeadModel

PRO: dict[str, Any] = {
    "hidden_ratio": 3.5,
    "use_output_gate": True,
    "use_output_norm": True,
    "qk_norm": True,
    "use_k_shift": True,
    "use_v_shift": True,
}
FIXED_GATE: dict[str, Any] = {"fgate_bias_init": True, "decay_time_min": 2.0, "decay_time_max": 4096.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "pro": PRO,
    "llama": {},
    "rope": {"use_rope": True},
    "rope_qk_norm_shared": {"use_rope": True, "qk_norm": True, "qk_norm_share_param_across_head": True},
    "pro_rope": {**PRO, "use_rope": True, "rope_base": 10000.0},
    "bias_only": {"fgate_type": "bias_only", "qk_norm": True},
    "fixed": {"fgate_type": "fixed", **FIXED_GATE},
    "no_gate": {"fgate_type": "none", "use_rope": True},
    "silu_output_gate": {"use_output_gate": True, "ogate_act": "silu"},
    "sigmoid_output_gate": {"use_output_gate": True, "hidden_act": "sigmoid"},
    "output_norm_only": {"use_output_norm": True, "qk_norm": True},
    "k_shift_only": {"use_k_shift": True},
    "v_shift_only": {"use_v_shift": True, "qk_norm": True},
    "tied": {**PRO, "tie_word_embeddings": True},
    "head_dim_64": {**PRO, "num_heads": 2},
    "head_dim_128": {**PRO, "hidden_size": 256, "num_heads": 2},
    "sharded": {**PRO, "shards": 2},
    "fla": {"dialect": "fla"},
    "fla_gqa_bias_qk_norm": {"dialect": "fla", "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True},
    "fla_gqa_bias": {"dialect": "fla", "num_kv_heads": 2, "qkv_bias": True},
    "fla_gqa_gate": {"dialect": "fla", "num_kv_heads": 1, "use_output_gate": True},
    "fla_tied_sharded": {"dialect": "fla", "qk_norm": True, "tie_word_embeddings": True, "shards": 2},
}
"""Keyword arguments of :func:`make_checkpoint`."""

GATE_BIASES = (-1.0, 1.0, 4.0, 14.0)
"""Heads in turn: forgets within some 30 to 50 tokens, within a few hundred, within thousands, never."""

VOCAB_SIZE = 257


def make_checkpoint(
    folder: str | Path,
    dialect: str = "official",
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    drop: tuple[str, ...] = (),
    extra: dict[str, torch.Tensor] | None = None,
    **overrides: Any,
) -> Path:
    """Write config.json, safetensors and a byte-level tokenizer.

    Args:
        folder: created if need be.
        dialect: "official" or "fla".
        shards: number of weight files; more than one come with an index.
        dtype: of the weights.
        seed: of the weights.
        drop: tensors to leave out.
        extra: tensors to add or replace.
        overrides: fields of the config.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(dialect, **overrides)
    config.dtype = dtype
    config.architectures = ["ForgettingTransformerForCausalLM"]
    config.save_pretrained(folder)
    tensors = {n: t.to(dtype) for n, t in make_weights(config, seed).items() if n not in drop} | (extra or {})
    _save_weights(folder, tensors, shards)
    save_tokenizer(folder)
    return folder


def make_sparse_gpt2(seed: int = 0, score: float = 2.4, **config: Any) -> SparseGPT2LMHeadModel:
    """A small model in evaluation mode whose interaction scores are about ``score`` +- 1."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 97, "int_n_embd": 8}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = SparseGPT2LMHeadModel(SparseGPT2Config(**sizes | ends | config)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("int_bias"):
                tensor.fill_(score)
            elif "_int" in name:
                tensor.normal_(std=0.2)
            else:  # weights of a size that makes logits differ
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def save_sparse_gpt2(folder: Path, **options: Any) -> Path:
    """A checkpoint of :func:`make_sparse_gpt2`, with a byte-level tokenizer."""
    make_sparse_gpt2(vocab_size=VOCAB_SIZE, **options).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def make_config(dialect: str = "official", **overrides: Any) -> FoxConfig | FlaForgettingTransformerConfig:
    """Two layers of four heads of 32 unless told otherwise."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_heads": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **overrides,
    }
    return FoxConfig(**fields) if dialect == "official" else FlaForgettingTransformerConfig(**fields)


def make_weights(config: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 tensors under the names of the config's dialect."""
    rng = torch.Generator().manual_seed(seed)
    return {
        name: _draw(name, shape, config.hidden_size, rng)
        for name, shape in expected_weights(Architecture.from_config(config)).items()
    }


def _draw(name: str, shape: tuple[int, ...], hidden: int, rng: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=rng)
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if "f_proj.bias" in name or "fgate" in name and len(shape) == 1:
        biases = torch.tensor([GATE_BIASES[h % len(GATE_BIASES)] for h in range(shape[0])])
        return biases + 0.1 * noise
    if leaf in ("q_norm", "k_norm"):
        return 0.4 + 0.4 * torch.rand(shape, generator=rng)
    if leaf.endswith("norm"):
        return 1.0 + 0.2 * noise
    scales = {
        "fgate_proj": 0.05,
        "f_proj": 0.05,
        "shift_proj": 0.1,
        "bias": 0.1,
        "embeddings": 0.5,
        "lm_head": 0.15,
    }
    return noise * scales.get(leaf, 0.7 / hidden**0.5)


def _save_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::shards])
        save_file(part, folder / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def save_tokenizer(folder: Path) -> None:
    end = "<|endoftext|>"
    pieces = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end})
    )
