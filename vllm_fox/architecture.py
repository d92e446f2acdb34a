"""The one description of a Forgetting Transformer, whichever dialect its checkpoint is written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configs import FlaForgettingTransformerConfig, FoxConfig

HEAD_DIMS = (32, 64, 128)
QK_NORM_EPS = 1e-5
"""Both dialects norm q and k with their norm layer's default, not with the config's ``norm_eps``."""


@dataclass(frozen=True)
class Architecture:
    """What a model is made of; n hidden size, h query heads, g KV heads, d = n / h (FoX, arXiv 2503.02130).

    Attributes:
        dialect: "official" or "fla": decides weight names only.
        gate: "full" (from the input), "bias_only", "fixed" or "none".
        rope_base: theta, or None for no positional embedding.
        k_shift, v_shift: data-dependent token shift of k and v.
        qk_norm: "none", "per_head" (a weight for every head) or "shared" (one weight of size d).
        output_gate: None, "sigmoid" or "silu".
        output_norm: RMS norm of each head's output, before the gate.
        qkv_bias: whether q, k and v projections have a bias.
        activation: of the gated MLP, "silu" or "sigmoid".
        log_pruning_tolerance: log eps of ACP that the model was trained with, if any.
    """

    dialect: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    gate: str
    rope_base: float | None
    k_shift: bool
    v_shift: bool
    qk_norm: str
    norm_eps: float
    output_gate: str | None
    output_norm: bool
    qkv_bias: bool
    activation: str
    tied_embeddings: bool
    log_pruning_tolerance: float | None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_config(cls, config: FoxConfig | FlaForgettingTransformerConfig) -> Architecture:
        """Normalise a config; it has been validated when it was made."""
        official = config.model_type != "forgetting_transformer"

        def own(name: str, default: Any) -> Any:
            """A field that only the official dialect has."""
            return getattr(config, name) if official else default

        if config.qk_norm:
            qk_norm = "shared" if own("qk_norm_share_param_across_head", False) else "per_head"
        else:
            qk_norm = "none"
        return cls(
            dialect="official" if official else "fla",
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            intermediate_size=config.intermediate_size
            or mlp_size(config.hidden_size, 4 if config.hidden_ratio is None else config.hidden_ratio),
            gate=own("fgate_type", "full"),
            rope_base=own("rope_base", None) if own("use_rope", False) else None,
            k_shift=own("use_k_shift", False),
            v_shift=own("use_v_shift", False),
            qk_norm=qk_norm,
            norm_eps=config.norm_eps,
            output_gate=own("ogate_act", "sigmoid") if config.use_output_gate else None,
            output_norm=own("use_output_norm", False),
            qkv_bias=False if official else config.qkv_bias,
            activation="sigmoid" if config.hidden_act == "sigmoid" else "silu",
            tied_embeddings=config.tie_word_embeddings,
            log_pruning_tolerance=config.log_pruning_tolerance,
        )

    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a checkpoint, in the dialect's names."""
        n, h, inter = self.hidden_size, self.num_heads, self.intermediate_size
        official = self.dialect == "official"
        shapes: dict[str, tuple[int, ...]] = {"model.embeddings.weight": (self.vocab_size, n)}
        for layer in range(self.num_layers):
            attn, mlp = f"model.layers.{layer}.attn.", f"model.layers.{layer}.mlp."
            shapes[f"model.layers.{layer}.attn_norm.weight"] = (n,)
            shapes[f"model.layers.{layer}.mlp_norm.weight"] = (n,)
            for name, size, shift in (
                ("q_proj", n, False),
                ("k_proj", self.kv_dim, self.k_shift),
                ("v_proj", self.kv_dim, self.v_shift),
            ):
                shapes[f"{attn}{name}.linear.weight" if shift else f"{attn}{name}.weight"] = (size, n)
                if shift:
                    shapes[f"{attn}{name}.shift_proj.weight"] = (h, n)
                if self.qkv_bias:
                    shapes[f"{attn}{name}.bias"] = (size,)
            shapes[f"{attn}o_proj.weight"] = (n, n)
            if self.gate == "full":
                gate = "fgate_proj" if official else "f_proj"
                shapes |= {f"{attn}{gate}.weight": (h, n), f"{attn}{gate}.bias": (h,)}
            elif self.gate != "none":
                shapes[f"{attn}fgate_bias"] = (h,)
            if self.qk_norm != "none":
                shared = (self.head_dim,)
                shapes[f"{attn}q_norm.weight"] = shared if self.qk_norm == "shared" else (n,)
                shapes[f"{attn}k_norm.weight"] = shared if self.qk_norm == "shared" else (self.kv_dim,)
            if self.output_gate is not None:
                shapes[f"{attn}{'ogate_proj' if official else 'g_proj'}.weight"] = (n, n)
            if self.output_norm:
                shapes[f"{attn}output_norm.weight"] = (n,)
            if official:
                shapes[f"{mlp}gate_proj.weight"] = (2 * inter, n)
            else:
                shapes |= {f"{mlp}gate_proj.weight": (inter, n), f"{mlp}up_proj.weight": (inter, n)}
            shapes[f"{mlp}down_proj.weight"] = (n, inter)
        shapes["model.norm.weight"] = (n,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, n)
        return shapes


def mlp_size(hidden_size: int, hidden_ratio: float) -> int:
    """Inner size of the MLP when a config gives none: two thirds of the ratio, up to a multiple of 256."""
    return 256 * -(-int(hidden_size * hidden_ratio * 2 / 3) // 256)
