"""Forgetting Transformers (FoX, arXiv 2503.02130), of both checkpoint dialects."""

from vllm_fox.family import Family

from .config import FlaForgettingTransformerConfig, FoxConfig
from .settings import FoxSettings
from .tokenizer import register_tokenizer

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
    float8_pages=True,
    prepare=register_tokenizer,
)
