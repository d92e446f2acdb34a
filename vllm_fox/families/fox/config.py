"""Config classes of both FoX dialects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_fox.strict_config import StrictConfig, own_fields

from .architecture import Architecture, resolve_intermediate_size


class _ForgettingTransformerConfig(StrictConfig):
    """The base of both dialects' configs, with names that vLLM and transformers expect."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads"}
    aliases: ClassVar[dict[str, str]] = {"num_key_value_heads": "num_key_value_heads", "head_dim": "head_dim"}

    if TYPE_CHECKING:  # set from ``own``; transformers makes dataclass fields of annotations that it sees
        hidden_size: int
        num_heads: int
        num_kv_heads: int | None

    # Without this __init__ transformers would generate one.
    def __init__(
        self,
        own: dict[str, Any] | None = None,
        quantization_config: dict[str, Any] | None = None,
        **standard: Any,
    ) -> None:
        if own is not None and quantization_config is not None:
            own["quantization_config"] = quantization_config
        super().__init__(own, **standard)

    def _complete(self) -> None:
        Architecture.from_config(self)
        self.intermediate_size = resolve_intermediate_size(self)
        # vLLM reads this name first and accepts null as its value, so it is set to a number.
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

    Fields and defaults are those of the official config. Fields about training only (``fuse_norm``,
    ``fuse_cross_entropy``) are read and do nothing. ``initializer_range`` is for random starts in training, and
    ``use_cache`` is the default of the model for transformers.

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
        super().__init__(own_fields(FoxConfig, locals()), **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, with null KV heads: the official code takes a number for grouped-query attention."""
        return super().to_dict() | {"num_kv_heads": None}


class FlaForgettingTransformerConfig(_ForgettingTransformerConfig):
    """Checkpoints of flash-linear-attention's ForgettingTransformer.

    Fields and defaults are those of that library's config, plus two that it lacks: ``max_position_embeddings``
    (the longest context, 2048 unless given) and ``log_pruning_tolerance`` (see :class:`FoxConfig`).
    Fields about training and kernels only (``fuse_*``, ``use_l2warp``, ``use_cache``) are read and do nothing.
    ``initializer_range`` is for random starts in training.

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
        super().__init__(own_fields(FlaForgettingTransformerConfig, locals()), **kwargs)
