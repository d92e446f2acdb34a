"""Config classes of both checkpoint dialects, registered with transformers.

``forgetting_transformer-project_fox`` is what the FoX authors' code writes, ``forgetting_transformer`` what
flash-linear-attention writes. Both name their architecture ForgettingTransformerForCausalLM.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .architecture import HEAD_DIMS

_GENERATION_FIELDS = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "tie_word_embeddings",
}
_STANDARD_FIELDS = {
    # What transformers itself may write into any config.json.
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "experts_implementation",
    "finetuning_task",
    "is_decoder",
    "add_cross_attention",
    "cross_attention_hidden_size",
    "tie_encoder_decoder",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "quantization_config",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "decoder_start_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_weights",
    "use_bfloat16",
    "per_layer_config",
}


def _fail(model_type: str, field: str, value: Any, reason: str) -> None:
    raise ValueError(f"config of a {model_type} model: {field} is {value!r}: {reason}")


class _ForgettingConfig(PretrainedConfig):
    """What both dialects share: construction that refuses unknown fields, and checks."""

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }
    defaults: ClassVar[dict[str, Any]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        # transformers makes a dataclass of every config class: its own fields are set by now, the rest is here.
        from transformers import GenerationConfig

        legacy = set(GenerationConfig().to_dict())
        known = set(self.defaults) | _GENERATION_FIELDS | _STANDARD_FIELDS | legacy
        for key in kwargs:
            if key not in known:
                _fail(self.model_type, key, kwargs[key], "vllm-fox does not know this field.")
        # Kept apart from transformers' own fields, some of which it drops as belonging to generation.
        self.tie_word_embeddings = kwargs.pop("tie_word_embeddings", False)
        special = {name: kwargs.pop(name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        self.use_cache = kwargs.pop("use_cache", True)
        for name, default in self.defaults.items():
            setattr(self, name, kwargs.pop(name, default))
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        self._check()
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.tie_word_embeddings)
        for name, value in special.items():
            setattr(self, name, value)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def _require(self, ok: bool, field: str, reason: str) -> None:
        if not ok:
            _fail(self.model_type, field, getattr(self, field), reason)

    def _check(self) -> None:
        require = self._require
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "num_kv_heads"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, field, "it must be a positive integer.")
        require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            f"it must be a multiple of num_heads ({self.num_heads}).",
        )
        require(
            self.head_dim in HEAD_DIMS,
            "num_heads",
            f"hidden_size / num_heads is {self.head_dim}, and must be one of {', '.join(map(str, HEAD_DIMS))}.",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"it must divide num_heads ({self.num_heads}).",
        )
        require(self.window_size is None, "window_size", "sliding windows are not supported; leave it null.")
        require(
            self.elementwise_affine is True, "elementwise_affine", "norms without weights are not supported."
        )
        require(
            self.hidden_act in ("swish", "silu", "sigmoid"), "hidden_act", 'it must be "swish" or "sigmoid".'
        )
        tolerance = self.log_pruning_tolerance
        require(
            tolerance is None or (isinstance(tolerance, (int, float)) and tolerance < 0),
            "log_pruning_tolerance",
            "it must be null or a negative number, such as -10.",
        )


class FoxConfig(_ForgettingConfig):
    """The dialect of the FoX authors' code."""

    model_type = "forgetting_transformer-project_fox"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "hidden_ratio": 4,
        "intermediate_size": None,
        "num_hidden_layers": 24,
        "num_heads": 32,
        "num_kv_heads": None,
        "hidden_act": "swish",
        "window_size": None,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "elementwise_affine": True,
        "norm_eps": 1e-6,
        "attention_bias": False,
        "fuse_norm": True,
        "fuse_cross_entropy": True,
        "rope_base": 500000.0,
        "use_rope": False,
        "use_output_gate": False,
        "ogate_act": "sigmoid",
        "fgate_type": "full",
        "fgate_bias_init": False,
        "decay_time_min": None,
        "decay_time_max": None,
        "use_output_norm": False,
        "qk_norm": False,
        "qk_norm_share_param_across_head": False,
        "use_k_shift": False,
        "use_v_shift": False,
        "log_pruning_tolerance": None,
    }

    def _check(self) -> None:
        super()._check()
        require = self._require
        require(
            self.num_kv_heads == self.num_heads,
            "num_kv_heads",
            f"this dialect has no grouped queries; it must be null or num_heads ({self.num_heads}).",
        )
        require(not self.attention_bias, "attention_bias", "this dialect's projections have no bias.")
        require(
            self.fgate_type in ("full", "bias_only", "fixed", "none"),
            "fgate_type",
            'it must be "full", "bias_only", "fixed" or "none".',
        )
        if self.fgate_type == "fixed":
            require(self.fgate_bias_init, "fgate_bias_init", 'it must be true with fgate_type "fixed".')
        if self.fgate_bias_init:
            require(
                self.fgate_type in ("bias_only", "fixed"),
                "fgate_bias_init",
                f'it goes with fgate_type "bias_only" or "fixed", not "{self.fgate_type}".',
            )
        for field in ("decay_time_min", "decay_time_max"):
            value = getattr(self, field)
            if self.fgate_bias_init:
                require(value is not None and value > 0, field, "with fgate_bias_init it must be positive.")
            else:
                require(value is None, field, "without fgate_bias_init it must be null.")
        require(self.ogate_act in ("sigmoid", "silu"), "ogate_act", 'it must be "sigmoid" or "silu".')
        if self.use_output_norm and self.use_output_gate:
            require(self.ogate_act == "sigmoid", "ogate_act", 'with use_output_norm it must be "sigmoid".')
        if self.qk_norm_share_param_across_head:
            require(bool(self.qk_norm), "qk_norm", "qk_norm_share_param_across_head needs it to be true.")


class FlaForgettingTransformerConfig(_ForgettingConfig):
    """The dialect of flash-linear-attention."""

    model_type = "forgetting_transformer"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "hidden_ratio": 4,
        "intermediate_size": None,
        "num_hidden_layers": 24,
        "num_heads": 32,
        "num_kv_heads": None,
        "qkv_bias": False,
        "qk_norm": False,
        "window_size": None,
        "use_output_gate": False,
        "hidden_act": "swish",
        "initializer_range": 0.02,
        "elementwise_affine": True,
        "norm_eps": 1e-6,
        "fuse_norm": True,
        "fuse_swiglu": True,
        "fuse_cross_entropy": True,
        "fuse_linear_cross_entropy": False,
        "use_l2warp": False,
        "attnres_block_size": None,
        # Not written by that library; a checkpoint may add them.
        "max_position_embeddings": 2048,
        "log_pruning_tolerance": None,
    }

    def _check(self) -> None:
        super()._check()
        self._require(
            self.attnres_block_size is None, "attnres_block_size", "attention residuals are not supported."
        )


def register_configs() -> None:
    """Tell transformers' AutoConfig about both dialects, so that no remote code is needed."""
    for config in (FoxConfig, FlaForgettingTransformerConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
