"""The Forgetting Transformer for transformers: training, evaluation and ``generate``. ``import vllm_fox.hf`` makes
``AutoModelForCausalLM`` know both checkpoint dialects."""

from transformers import AutoModelForCausalLM

from vllm_fox.configs import FlaForgettingTransformerConfig, FoxConfig, register_configs
from vllm_fox.tokenizer import register_tokenizer

from .cache import ForgettingCache
from .live_share import live_shares
from .modeling import FlaForgettingTransformerForCausalLM, ForgettingTransformerForCausalLM

register_configs()
register_tokenizer()
AutoModelForCausalLM.register(FoxConfig, ForgettingTransformerForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(FlaForgettingTransformerConfig, FlaForgettingTransformerForCausalLM, exist_ok=True)

__all__ = [
    "FlaForgettingTransformerConfig",
    "FlaForgettingTransformerForCausalLM",
    "ForgettingCache",
    "ForgettingTransformerForCausalLM",
    "FoxConfig",
    "live_shares",
]
