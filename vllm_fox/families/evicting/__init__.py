"""Decoders whose KV heads evict tokens: Llama, Mistral, Qwen2 and Qwen3 with DMS or KVzap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm_fox.family import Family

from .config import EvictingDecoderConfig, Eviction

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def _refusals(vllm_config: VllmConfig) -> Iterable[tuple[object, str]]:
    config, ranks = vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size
    eviction = Eviction.from_dict(config.eviction)
    heads = config.num_key_value_heads
    borrowed = eviction.method == "dms_borrowed_neuron"
    # The query head that decides is on one rank only.
    yield (
        borrowed and ranks > heads,
        f"--tensor-parallel-size {ranks} with {heads} KV heads and a borrowed neuron",
    )
    yield (
        borrowed and eviction.decides == "layer" and ranks > 1,
        f"--tensor-parallel-size {ranks} if the first KV head decides for its layer by a borrowed neuron",
    )


def _as_published(model: ModelConfig) -> str | None:
    """Refuse a checkpoint with DMS as Model-Optimizer saves it: its ``model_type`` is that of the dense model."""
    found = sorted(name for name in vars(model.hf_config) if name.startswith("dms_"))
    if not found:
        return None
    return (
        f"{model.model} evicts tokens by DMS ({found[0]} and other fields of its config.json), and would be served "
        f"as if it did not: run `python -m vllm_fox.convert {model.model} OUT` and serve OUT."
    )


EVICTING = Family(
    name="Decoders that evict tokens",
    architectures={"EvictingDecoderForCausalLM": "vllm_fox.families.evicting.model:EvictingDecoderForCausalLM"},
    configs={EvictingDecoderConfig: "vllm_fox.hf.evicting.modeling:EvictingDecoderForCausalLM"},
    stream="one KV head of one layer",
    streams=lambda config: config.num_hidden_layers * config.num_key_value_heads,
    # A request holds up to three pages per stream beyond its live tokens.
    page_size=32,
    float8_pages=True,
    quantized_weights=True,
    adapters=True,
    speculation=True,
    refusals=_refusals,
    token_ends="vllm_fox.hf.evicting.token_ends:token_ends",
    lookalikes=dict.fromkeys(
        (f"{name}{kind}" for name in ("Llama", "Mistral", "Qwen2", "Qwen3") for kind in ("ForCausalLM", "Model")),
        _as_published,
    ),
)
