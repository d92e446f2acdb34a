"""The config class of GPT-2 with Dynamic Context Pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_fox.config_fields import Fields
from vllm_fox.strict_config import StrictConfig, own_fields


class SparseGPT2Config(StrictConfig):
    """GPT-2 with Dynamic Context Pruning (arXiv 2305.15805). The fields are those of its authors' code.

    Args:
        block_size: longest context.
        bias: whether linear layers and norms have biases.
        int_n_embd: size of the interaction queries and keys.
        propagate_in_depth: whether what a layer drops is dropped in all layers above it.

    Raises:
        ValueError: a field is unknown or has a value out of range.
    """

    model_type = "sparse_gpt2"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "block_size",
    }

    aliases: ClassVar[dict[str, str]] = {"n_positions": "block_size", "n_ctx": "block_size"}
    only: ClassVar[dict[str, tuple[Any, ...]]] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
    }

    if TYPE_CHECKING:
        n_layer: int
        n_head: int
        n_embd: int
        block_size: int
        vocab_size: int
        bias: bool
        int_n_embd: int
        propagate_in_depth: bool

    def __init__(
        self,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        block_size: int = 1024,
        vocab_size: int = 50257,
        bias: bool = True,
        int_n_embd: int = 64,
        propagate_in_depth: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        own = own_fields(SparseGPT2Config, locals())
        super().__init__(own, tie_word_embeddings=own.pop("tie_word_embeddings"), **kwargs)

    def _complete(self) -> None:
        check = Fields.of(self)
        check.integers("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "int_n_embd")
        check.flags("bias", "propagate_in_depth")
        check.divides("n_head", "n_embd")
        check.one_of("tie_word_embeddings", (True,))
