"""The models for transformers: training, evaluation and ``generate``.

``import vllm_fox.hf`` registers the models of all families with ``AutoModelForCausalLM``, and those of the families
here without their heads with ``AutoModel``.
"""

from transformers import AutoModel

from vllm_fox.families.evicting.config import EvictingDecoderConfig
from vllm_fox.families.fox.config import FlaForgettingTransformerConfig, FoxConfig
from vllm_fox.families.sparse_gpt2.config import SparseGPT2Config
from vllm_fox.registration import register_configs, register_transformers_models

from .compiling import compile_layers
from .evicting.modeling import EvictingDecoderForCausalLM, EvictingDecoderModel
from .fox.cache import ForgettingCache
from .fox.live_share import live_shares
from .fox.modeling import (
    FlaForgettingTransformerForCausalLM,
    FlaForgettingTransformerModel,
    ForgettingTransformerForCausalLM,
    ForgettingTransformerModel,
)
from .sparse_gpt2.alpha_sigmoid import alpha_sigmoid
from .sparse_gpt2.modeling import SparseGPT2LMHeadModel, SparseGPT2Model

register_configs()
register_transformers_models()
for _model in (ForgettingTransformerModel, FlaForgettingTransformerModel, SparseGPT2Model, EvictingDecoderModel):
    AutoModel.register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "EvictingDecoderConfig",
    "EvictingDecoderForCausalLM",
    "EvictingDecoderModel",
    "FlaForgettingTransformerConfig",
    "FlaForgettingTransformerForCausalLM",
    "FlaForgettingTransformerModel",
    "ForgettingCache",
    "ForgettingTransformerForCausalLM",
    "ForgettingTransformerModel",
    "FoxConfig",
    "SparseGPT2Config",
    "SparseGPT2LMHeadModel",
    "SparseGPT2Model",
    "alpha_sigmoid",
    "compile_layers",
    "live_shares",
]
