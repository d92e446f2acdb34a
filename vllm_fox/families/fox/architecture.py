"""A normalised description of a Forgetting Transformer, the same for both checkpoint dialects.

This module reads a config's attributes, but otherwise depends on neither vLLM nor transformers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from vllm_fox.kernels.forgetting.pages import HEAD_DIMS

QK_NORM_EPS = 1e-5
"""Both implementations leave the epsilon of QK-norm at their norm layers' default, whatever norm_eps says."""

OFFICIAL = "official"
FLA = "fla"


_PROJECTION = re.compile(r"\.(attn\.([qkvog]|ogate)_proj(\.linear)?|mlp\.(gate|up|down)_proj)\.weight$")
_CACHE_SCALE = re.compile(r"\.attn\.([qkv]|prob(_output)?)_scale$|\.attn\.[qkv]_proj\.(linear\.)?output_scale$")


@dataclass(frozen=True)
class Architecture:
    """What a FoX model computes (Forgetting Transformer, arXiv 2503.02130).

    Attributes:
        dialect: "official" or "fla", which decides how the checkpoint names its tensors.
        vocab_size, hidden_size, intermediate_size, num_layers: sizes.
        num_heads, num_kv_heads, head_dim: num_heads * head_dim = hidden_size; every query head has a forget gate.
        gate: "full" (a projection of the layer's input), "bias_only" or "fixed" (a constant per head), or "none".
        qk_norm: "none", "per_head" (a weight of head_dim per head) or "shared" (one such weight for all heads).
        rope_base: theta of RoPE over whole heads, after QK-norm; None without RoPE.
        k_shift, v_shift: whether the projected k or v has a data-dependent token shift, before QK-norm.
        output_gate: activation of the gate on the attention output: "sigmoid" or "silu"; None without a gate.
        output_norm: whether each head's output is RMS-normed, before the gate.
        qkv_bias: whether q, k and v have biases.
        mlp_act: activation of the gated MLP: "silu" or "sigmoid".
        norm_eps: epsilon of all norms but QK-norm.
        qk_norm_eps: epsilon of QK-norm.
        tied_embeddings: whether lm_head is the embedding matrix.
        log_pruning_tolerance: log eps of ACP (arXiv 2504.06949) that the checkpoint asks for, or None.
    """

    dialect: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gate: str
    qk_norm: str
    rope_base: float | None
    k_shift: bool
    v_shift: bool
    output_gate: str | None
    output_norm: bool
    qkv_bias: bool
    mlp_act: str
    norm_eps: float
    qk_norm_eps: float
    tied_embeddings: bool
    log_pruning_tolerance: float | None

    @classmethod
    def from_config(cls, config: Any) -> Architecture:
        """Read a FoxConfig or a FlaForgettingTransformerConfig, told apart by ``model_type``.

        Raises:
            ValueError: a field has a value that no checkpoint of the dialect can have, or fields contradict
                one another. The message names the field, its value and what is allowed.
        """
        official = config.model_type.endswith("project_fox")
        _check_common(config)
        (_check_official if official else _check_fla)(config)
        qk_norm = "none"
        if config.qk_norm:
            qk_norm = "shared" if official and config.qk_norm_share_param_across_head else "per_head"
        gated = bool(config.use_output_gate)
        return cls(
            dialect=OFFICIAL if official else FLA,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=resolve_intermediate_size(config),
            num_layers=config.num_hidden_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads if config.num_kv_heads is None else config.num_kv_heads,
            head_dim=config.hidden_size // config.num_heads,
            gate=config.fgate_type if official else "full",
            qk_norm=qk_norm,
            rope_base=float(config.rope_base) if official and config.use_rope else None,
            k_shift=official and config.use_k_shift,
            v_shift=official and config.use_v_shift,
            output_gate=(config.ogate_act if official else "sigmoid") if gated else None,
            output_norm=official and config.use_output_norm,
            qkv_bias=not official and config.qkv_bias,
            mlp_act="sigmoid" if config.hidden_act == "sigmoid" else "silu",
            norm_eps=float(config.norm_eps),
            qk_norm_eps=QK_NORM_EPS,
            tied_embeddings=bool(config.tie_word_embeddings),
            log_pruning_tolerance=config.log_pruning_tolerance,
        )


def resolve_intermediate_size(config: Any) -> int:
    """Return the MLP's inner size: as given, else 2/3 * hidden_size * hidden_ratio up to a multiple of 256."""
    if config.intermediate_size is not None:
        return config.intermediate_size
    ratio = 4 if config.hidden_ratio is None else config.hidden_ratio
    size = 256 * math.ceil(int(config.hidden_size * ratio * 2 / 3) / 256)
    if not size:
        raise ValueError(
            f"{config.model_type} config: hidden_ratio is {ratio!r}: give a greater one, or null for 4."
        )
    return size


def expected_weights(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of this model's checkpoint, by its name in the checkpoint's own dialect.

    ``lm_head.weight`` is not among them if the embeddings are tied.
    """
    hidden, inner, heads, dim = arch.hidden_size, arch.intermediate_size, arch.num_heads, arch.head_dim
    kv_hidden = arch.num_kv_heads * dim
    official = arch.dialect == OFFICIAL
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "mlp_norm.weight": (hidden,),
        "mlp.gate_proj.weight": (2 * inner if official else inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "attn.q_proj.weight": (hidden, hidden),
        "attn.o_proj.weight": (hidden, hidden),
    }
    if not official:
        layer["mlp.up_proj.weight"] = (inner, hidden)
    for name, shifted in (("k", arch.k_shift), ("v", arch.v_shift)):
        if shifted:
            layer[f"attn.{name}_proj.linear.weight"] = (kv_hidden, hidden)
            layer[f"attn.{name}_proj.shift_proj.weight"] = (arch.num_kv_heads, hidden)
        else:
            layer[f"attn.{name}_proj.weight"] = (kv_hidden, hidden)
    if arch.qkv_bias:
        for name, size in (("q", hidden), ("k", kv_hidden), ("v", kv_hidden)):
            layer[f"attn.{name}_proj.bias"] = (size,)
    if arch.gate == "full":
        gate = "fgate_proj" if official else "f_proj"
        layer[f"attn.{gate}.weight"] = (heads, hidden)
        layer[f"attn.{gate}.bias"] = (heads,)
    elif arch.gate != "none":
        layer["attn.fgate_bias"] = (heads,)
    if arch.qk_norm != "none":
        shared = arch.qk_norm == "shared"
        layer["attn.q_norm.weight"] = (dim if shared else hidden,)
        layer["attn.k_norm.weight"] = (dim if shared else kv_hidden,)
    if arch.output_norm:
        layer["attn.output_norm.weight"] = (hidden,)
    if arch.output_gate is not None:
        layer[f"attn.{'ogate_proj' if official else 'g_proj'}.weight"] = (hidden, hidden)

    weights = {
        "model.embeddings.weight": (arch.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not arch.tied_embeddings:
        weights["lm_head.weight"] = (arch.vocab_size, hidden)
    for index in range(arch.num_layers):
        weights.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    return weights


def is_derived_weight(arch: Architecture, name: str) -> bool:
    """Return whether a checkpoint may hold this tensor although it is not read.

    It follows from the others or the config, or it is a scale by which others quantise keys and values.
    """
    derived = name.endswith(".rotary.inv_freq") or (arch.tied_embeddings and name == "lm_head.weight")
    return derived or _CACHE_SCALE.search(name) is not None


def may_be_quantised(name: str) -> bool:
    """Return whether a tensor is the weight of a projection, which a checkpoint may store quantised."""
    return _PROJECTION.search(name) is not None


# Checks. Each raises one ValueError that names the field, its value and what is allowed.


def _refuse(config: Any, field: str, allowed: str) -> None:
    raise ValueError(f"{config.model_type} config: {field} is {getattr(config, field)!r}: {allowed}.")


def _check_common(config: Any) -> None:
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "max_position_embeddings"):
        _whole(config, field)
    _whole(config, "num_kv_heads", optional=True)
    _whole(config, "intermediate_size", optional=True)
    _positive(config, "hidden_ratio", optional=True)
    _positive(config, "norm_eps")
    for field in ("qk_norm", "use_output_gate", "tie_word_embeddings"):
        _flag(config, field)
    if config.hidden_size % config.num_heads:
        _refuse(config, "num_heads", f"it must divide hidden_size ({config.hidden_size})")
    dim = config.hidden_size // config.num_heads
    if dim not in HEAD_DIMS:
        sizes = ", ".join(map(str, HEAD_DIMS))
        _refuse(
            config,
            "num_heads",
            f"with hidden_size {config.hidden_size} heads are of {dim}; heads of {sizes} are supported",
        )
    if config.num_kv_heads is not None and config.num_heads % config.num_kv_heads:
        _refuse(config, "num_kv_heads", f"it must divide num_heads ({config.num_heads})")
    if config.window_size is not None:
        _refuse(config, "window_size", "it must be null; windowed forgetting attention is not supported")
    if config.elementwise_affine is not True:
        _refuse(config, "elementwise_affine", "it must be true; FoX checkpoints have norm weights")
    tolerance = config.log_pruning_tolerance
    if tolerance is not None and not (_is_number(tolerance) and -math.inf < tolerance < 0):
        _refuse(config, "log_pruning_tolerance", "it must be null or a negative number such as -10")


def _check_official(config: Any) -> None:
    for field in (
        "use_rope",
        "fgate_bias_init",
        "use_output_norm",
        "qk_norm_share_param_across_head",
        "use_k_shift",
        "use_v_shift",
    ):
        _flag(config, field)
    _positive(config, "rope_base")
    _one_of(config, "hidden_act", ("swish", "silu", "sigmoid"))
    _one_of(config, "ogate_act", ("sigmoid", "silu"))
    _one_of(config, "fgate_type", ("full", "bias_only", "fixed", "none"))
    if config.num_kv_heads not in (None, config.num_heads):
        _refuse(
            config,
            "num_kv_heads",
            f"it must be null or num_heads ({config.num_heads}); this dialect has no grouped-query attention",
        )
    if config.attention_bias is not False:
        _refuse(config, "attention_bias", "it must be false; q, k, v and o have no biases in this dialect")
    if config.use_output_norm and config.use_output_gate and config.ogate_act != "sigmoid":
        _refuse(config, "ogate_act", "it must be 'sigmoid' where use_output_norm and use_output_gate are true")
    if config.qk_norm_share_param_across_head and not config.qk_norm:
        _refuse(config, "qk_norm_share_param_across_head", "it must be false where qk_norm is false")
    _check_gate_init(config)


def _check_gate_init(config: Any) -> None:
    if config.fgate_bias_init and config.fgate_type not in ("bias_only", "fixed"):
        _refuse(
            config,
            "fgate_bias_init",
            f"it must be false with fgate_type {config.fgate_type!r}, which is learned",
        )
    if config.fgate_type == "fixed" and not config.fgate_bias_init:
        _refuse(config, "fgate_bias_init", "it must be true with fgate_type 'fixed'")
    for field in ("decay_time_min", "decay_time_max"):
        if config.fgate_bias_init:
            _positive(config, field, why="where fgate_bias_init is true")
        elif getattr(config, field) is not None:
            _refuse(config, field, "it must be null where fgate_bias_init is false")


def _check_fla(config: Any) -> None:
    _flag(config, "qkv_bias")
    _one_of(config, "hidden_act", ("swish", "silu"))
    if config.attnres_block_size is not None:
        _refuse(config, "attnres_block_size", "it must be null; attention residuals are not supported")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(config: Any, field: str, optional: bool = False) -> None:
    value = getattr(config, field)
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _refuse(config, field, "it must be a positive integer" + (" or null" if optional else ""))


def _positive(config: Any, field: str, optional: bool = False, why: str = "") -> None:
    value = getattr(config, field)
    if optional and value is None:
        return
    if not _is_number(value) or not 0 < value < math.inf:
        _refuse(
            config,
            field,
            "it must be a positive number" + (" or null" if optional else "") + (f" {why}" if why else ""),
        )


def _flag(config: Any, field: str) -> None:
    if not isinstance(getattr(config, field), bool):
        _refuse(config, field, "it must be true or false")


def _one_of(config: Any, field: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, field) not in allowed:
        _refuse(config, field, "it must be one of " + ", ".join(map(repr, allowed)))
