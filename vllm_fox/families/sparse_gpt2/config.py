"""The config class of GPT-2 with Dynamic Context Pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

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
        for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "int_n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.model_type} config: {name} is {value!r}: it must be an integer from 1 on.")
        for name in ("bias", "propagate_in_depth"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{self.model_type} config: {name} is {getattr(self, name)!r}: true or false.")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"{self.model_type} config: n_embd {self.n_embd} is no multiple of n_head {self.n_head}."
            )
        if self.tie_word_embeddings is not True:
            raise ValueError(
                f"{self.model_type} config: tie_word_embeddings is {self.tie_word_embeddings!r}: it must be true."
            )
