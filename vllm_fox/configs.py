"""Config classes of both FoX dialects and of DCP's GPT-2, known to transformers' AutoConfig once registered."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from .architecture import Architecture, resolve_intermediate_size


class _StrictConfig(PretrainedConfig):
    """Fields that the class does not know are refused, and a near miss is named."""

    def __init__(
        self,
        own: dict[str, Any] | None = None,
        *,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        tie_word_embeddings: bool = False,
        **standard: Any,
    ) -> None:
        own = own or {}
        known = [*own, "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"]
        for name, value in standard.items():
            if name not in _STANDARD and not name.startswith("_"):
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
                fix = f"did you mean {near[0]}?" if near else f"remove it; the fields are {', '.join(known)}."
                raise ValueError(f"{self.model_type} config: unknown field {name} (value {value!r}): {fix}")
        for name, value in own.items():
            setattr(self, name, value)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**standard)
        if own:
            self._complete()

    def _complete(self) -> None:
        """Check the fields, and set those that follow from them: of these there are none."""


class _ForgettingTransformerConfig(_StrictConfig):
    """What both dialects of FoX share: names that vLLM and transformers expect."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}

    if TYPE_CHECKING:  # set from ``own``; an annotation here would become a dataclass field of transformers'
        hidden_size: int
        num_heads: int
        num_kv_heads: int | None

    # transformers writes one of its own for a class that has none.
    def __init__(self, own: dict[str, Any] | None = None, **standard: Any) -> None:
        super().__init__(own, **standard)

    def _complete(self) -> None:
        Architecture.from_config(self)
        self.intermediate_size = resolve_intermediate_size(self)
        # vLLM reads this name first, and takes null for an answer.
        self.num_kv_heads = self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_key_value_heads(self) -> int:
        """KV heads: ``num_kv_heads``, or as many as query heads if that is null."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class FoxConfig(_ForgettingTransformerConfig):
    """Checkpoints of the official implementation (FoX, arXiv 2503.02130).

    Fields and defaults are those of the official config. Fields about training only (``initializer_range``,
    ``fuse_norm``, ``fuse_cross_entropy``, ``use_cache``) are read and do nothing.

    Raises:
        ValueError: a field is unknown, has a value out of range, or contradicts another.
    """

    model_type = "forgetting_transformer-project_fox"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        hidden_ratio: float | None = 4,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 24,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        hidden_act: str = "swish",
        window_size: int | None = None,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        attention_bias: bool = False,
        fuse_norm: bool = True,
        fuse_cross_entropy: bool = True,
        rope_base: float = 500000.0,
        use_rope: bool = False,
        use_output_gate: bool = False,
        ogate_act: str = "sigmoid",
        fgate_type: str = "full",
        fgate_bias_init: bool = False,
        decay_time_min: float | None = None,
        decay_time_max: float | None = None,
        use_output_norm: bool = False,
        qk_norm: bool = False,
        qk_norm_share_param_across_head: bool = False,
        use_k_shift: bool = False,
        use_v_shift: bool = False,
        log_pruning_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_own_fields(FoxConfig, locals()), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Every field, as the official code reads them: KV heads that are not null it takes for grouped ones."""
        return super().to_dict() | {"num_kv_heads": None}


class FlaForgettingTransformerConfig(_ForgettingTransformerConfig):
    """Checkpoints of flash-linear-attention's ForgettingTransformer.

    Fields and defaults are those of that library's config, and two that it lacks: ``max_position_embeddings``
    (the longest context, 2048 unless given) and ``log_pruning_tolerance`` (see :class:`FoxConfig`).
    Fields about training and kernels only (``fuse_*``, ``use_l2warp``, ``initializer_range``, ``use_cache``)
    are read and do nothing.

    Raises:
        ValueError: a field is unknown, has a value out of range, or contradicts another.
    """

    model_type = "forgetting_transformer"

    def __init__(
        self,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_heads: int = 32,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        window_size: int | None = None,
        use_output_gate: bool = False,
        hidden_ratio: float | None = 4,
        intermediate_size: int | None = None,
        hidden_act: str = "swish",
        initializer_range: float = 0.02,
        elementwise_affine: bool = True,
        norm_eps: float = 1e-6,
        use_cache: bool = True,
        fuse_norm: bool = True,
        fuse_swiglu: bool = True,
        fuse_cross_entropy: bool = True,
        fuse_linear_cross_entropy: bool = False,
        use_l2warp: bool = False,
        vocab_size: int = 32000,
        attnres_block_size: int | None = None,
        max_position_embeddings: int = 2048,
        log_pruning_tolerance: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(_own_fields(FlaForgettingTransformerConfig, locals()), **kwargs)


class SparseGPT2Config(_StrictConfig):
    """GPT-2 with Dynamic Context Pruning (arXiv 2305.15805); fields as in its authors' code.

    Args:
        block_size: longest context.
        bias: of linear layers and norms.
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
        own = _own_fields(SparseGPT2Config, locals())
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
        if not self.tie_word_embeddings:
            raise ValueError(f"{self.model_type} config: tie_word_embeddings is false: it must be true.")


def register_configs() -> None:
    """Make these classes what AutoConfig uses for their model types; safe to call again.

    They win over classes that the official package or flash-linear-attention registered before.
    """
    for config in (FoxConfig, FlaForgettingTransformerConfig, SparseGPT2Config):
        AutoConfig.register(config.model_type, config, exist_ok=True)


def _own_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """The named arguments of ``cls.__init__`` with their values, in order."""
    names = [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()  # type: ignore[misc]
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
    ]
    return {name: values[name] for name in names}


def _standard_fields() -> frozenset[str]:
    """Fields that any config.json may have: transformers' own, now or in the 4.x releases that wrote many."""
    now = {field.name for field in dataclasses.fields(PretrainedConfig)}
    generation = set(GenerationConfig().to_dict())
    other = """
        add_cross_attention attn_implementation auto_map begin_suppress_tokens
        cross_attention_hidden_size decoder_start_token_id experts_implementation finetuning_task
        is_decoder max_length min_length model_type name_or_path num_labels output_attentions
        per_layer_config prefix pruned_heads remove_invalid_values sep_token_id suppress_tokens
        task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype
        torchscript transformers_version use_bfloat16
    """
    return frozenset(now | generation | set(other.split()))


_STANDARD = _standard_fields()
