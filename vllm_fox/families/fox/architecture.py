"""A normalised description of a Forgetting Transformer, the same for both checkpoint dialects.

This module reads a config's attributes, but otherwise depends on neither vLLM nor transformers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from vllm_fox.config_fields import Fields, is_number, listed
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
        check = Fields.of(config)
        _check_common(config, check)
        if official:
            _check_official(config, check)
        else:
            _check_fla(check)
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
        Fields.of(config).refuse("hidden_ratio", "greater, or null for 4")
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


def _check_common(config: Any, check: Fields) -> None:
    check.integers("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "max_position_embeddings")
    check.integers("num_kv_heads", "intermediate_size", optional=True)
    check.positive("hidden_ratio", optional=True)
    check.positive("norm_eps")
    check.flags("qk_norm", "use_output_gate", "tie_word_embeddings")
    check.divides("num_heads", "hidden_size")
    dim = config.hidden_size // config.num_heads
    if dim not in HEAD_DIMS:
        sizes = f"{listed(HEAD_DIMS)}, and not {dim}"
        check.refuse(
            "num_heads", f"such that a head's size, hidden_size ({config.hidden_size}) / num_heads, is {sizes}"
        )
    check.divides("num_kv_heads", "num_heads")
    check.one_of("window_size", (None,), "because windowed forgetting attention is not supported")
    check.one_of("elementwise_affine", (True,), "because FoX checkpoints have norm weights")
    tolerance = config.log_pruning_tolerance
    if tolerance is not None and not (is_number(tolerance) and tolerance < 0):
        check.refuse("log_pruning_tolerance", "null or a negative number such as -10")


def _check_official(config: Any, check: Fields) -> None:
    check.flags("use_rope", "fgate_bias_init", "use_output_norm", "qk_norm_share_param_across_head")
    check.flags("use_k_shift", "use_v_shift")
    check.positive("rope_base")
    check.one_of("hidden_act", ("swish", "silu", "sigmoid"))
    check.one_of("ogate_act", ("sigmoid", "silu"))
    check.one_of("fgate_type", ("full", "bias_only", "fixed", "none"))
    if config.num_kv_heads not in (None, config.num_heads):
        why = "because this dialect has no grouped-query attention"
        check.refuse("num_kv_heads", f"null or num_heads ({config.num_heads})", why)
    check.one_of("attention_bias", (False,), "because q, k, v and o have no biases in this dialect")
    if config.use_output_norm and config.use_output_gate:
        check.one_of("ogate_act", ("sigmoid",), "where use_output_norm and use_output_gate are true")
    if not config.qk_norm:
        check.one_of("qk_norm_share_param_across_head", (False,), "where qk_norm is false")
    _check_gate_init(config, check)


def _check_gate_init(config: Any, check: Fields) -> None:
    gate = f"with fgate_type {config.fgate_type!r}"
    if config.fgate_type not in ("bias_only", "fixed"):
        check.one_of("fgate_bias_init", (False,), f"{gate}, which is learned")
    if config.fgate_type == "fixed":
        check.one_of("fgate_bias_init", (True,), gate)
    for field in ("decay_time_min", "decay_time_max"):
        if config.fgate_bias_init:
            check.positive(field, why="where fgate_bias_init is true")
        else:
            check.one_of(field, (None,), "where fgate_bias_init is false")


def _check_fla(check: Fields) -> None:
    check.flags("qkv_bias")
    check.one_of("hidden_act", ("swish", "silu"))
    check.one_of("attnres_block_size", (None,), "because attention residuals are not supported")
