"""Forgetting Transformers (FoX, arXiv 2503.02130), of both checkpoint dialects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_fox.family import Family

from .architecture import Architecture
from .config import FlaForgettingTransformerConfig, FoxConfig
from .settings import FoxSettings
from .tokenizer import register_tokenizer

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def _refusals(vllm_config: VllmConfig) -> Iterable[tuple[object, str]]:
    from vllm import envs

    model, precision = vllm_config.model_config, envs.VLLM_FLOAT32_MATMUL_PRECISION
    arch, ranks, lora = (
        Architecture.from_config(model.hf_config),
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.lora_config,
    )
    bounded_by_weights = arch.qk_norm == "none"
    # The bound is of the weights that all requests share, and is known before adapters come.
    yield (
        lora and bounded_by_weights,
        "LoRA (--enable-lora) without QK-norm, as adapters change what bounds pruning",
    )
    # vLLM's layer for adapters takes each rank's part of every projection for another one.
    yield (
        lora and ranks > arch.num_kv_heads,
        f"LoRA (--enable-lora) with --tensor-parallel-size {ranks} and {arch.num_kv_heads} KV heads",
    )
    # A product of rounded factors can be larger than the bound that follows from the projections' weights.
    rounded = precision != "highest" and str(model.dtype) == "torch.float32" and bounded_by_weights
    yield rounded, f"rounded float32 products without QK-norm (VLLM_FLOAT32_MATMUL_PRECISION={precision})"


FOX = Family(
    name="Forgetting Transformers",
    architectures={
        "ForgettingTransformerForCausalLM": "vllm_fox.families.fox.model:ForgettingTransformerForCausalLM"
    },
    configs={
        FoxConfig: "vllm_fox.hf.fox.modeling:ForgettingTransformerForCausalLM",
        FlaForgettingTransformerConfig: "vllm_fox.hf.fox.modeling:FlaForgettingTransformerForCausalLM",
    },
    stream="one KV head of one layer",
    streams=lambda config: config.num_hidden_layers * config.num_key_value_heads,
    page_size=64,
    settings=FoxSettings,
    shares_pages=True,
    float8_pages=True,
    quantized_weights=True,
    adapters=True,
    speculation=True,
    refusals=_refusals,
    token_ends="vllm_fox.hf.fox.live_share:token_ends",
    whole_pages=True,
    prepare=register_tokenizer,
)
