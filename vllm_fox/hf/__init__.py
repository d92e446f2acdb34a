"""The models for transformers: training, evaluation and ``generate``. ``import vllm_fox.hf`` makes
``AutoModelForCausalLM`` know both FoX dialects and DCP's GPT-2."""

from transformers import AutoModelForCausalLM

from vllm_fox.configs import FlaForgettingTransformerConfig, FoxConfig, SparseGPT2Config, register_configs
from vllm_fox.tokenizer import register_tokenizer

from .alpha_sigmoid import alpha_sigmoid
from .cache import ForgettingCache
from .compiling import compile_layers
from .live_share import live_shares
from .modeling import FlaForgettingTransformerForCausalLM, ForgettingTransformerForCausalLM
from .sparse_gpt2 import SparseGPT2LMHeadModel

register_configs()
register_tokenizer()
AutoModelForCausalLM.register(FoxConfig, ForgettingTransformerForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(FlaForgettingTransformerConfig, FlaForgettingTransformerForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(SparseGPT2Config, SparseGPT2LMHeadModel, exist_ok=True)

__all__ = [
    "FlaForgettingTransformerConfig",
    "FlaForgettingTransformerForCausalLM",
    "ForgettingCache",
    "ForgettingTransformerForCausalLM",
    "FoxConfig",
    "SparseGPT2Config",
    "SparseGPT2LMHeadModel",
    "alpha_sigmoid",
    "compile_layers",
    "live_shares",
]
