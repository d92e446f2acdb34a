"""The config class of decoders that evict tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_fox.strict_config import StrictConfig, own_fields

METHODS = ("dms_borrowed_neuron", "dms_adapter", "kvzap")
ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
    "yarn": ("factor",),
}
"""The values of ``rope_type``, and the factors that each needs in ``rope_parameters``."""


@dataclass(frozen=True, kw_only=True)
class Eviction:
    """How a checkpoint's KV heads decide which tokens they evict; the field ``eviction`` of its config.json.

    Attributes:
        method: where the decision comes from: a neuron of the query or an adapter (Dynamic Memory Sparsification,
            arXiv 2506.05345), or a predictor beside an unchanged model (KVzap, arXiv 2601.07891).
        window: W: an evicted token at position j is visible to the queries up to ``j + W``.
        shift: 1 if a token decides about the one before it, 0 if about itself.
        scale, offset: of DMS: a token is evicted if ``scale * logit - offset > 0``.
        threshold: of KVzap: a token is evicted if its score is less.
        hidden_dim: of KVzap: size of the predictor's hidden layer; None if it is linear.
        bias: of the DMS adapter: whether its projection has one.
        decides: "head": each KV head for itself; "layer": the first one for all.
        disabled: whether nothing is evicted.
        prefill: "masked": a prompt's tokens leave their window as they do while an answer is written.
    """

    method: str
    window: int
    shift: int
    scale: float | None = None
    offset: float | None = None
    threshold: float | None = None
    hidden_dim: int | None = None
    bias: bool = False
    decides: str = "head"
    disabled: bool = False
    prefill: str = "masked"

    @classmethod
    def from_dict(cls, given: Any) -> Eviction:
        """Check the config's field.

        Raises:
            ValueError: something is missing, unknown, or has a value that it cannot have. The message names it.
        """
        if not isinstance(given, Mapping):
            raise ValueError(f"eviction is {given!r}: it must be an object.")
        names = [one.name for one in fields(cls)]
        for name in given:
            if name not in names:
                raise ValueError(f"eviction.{name} is unknown: the fields are {', '.join(names)}.")
        for name in ("method", "window", "shift"):
            if name not in given:
                raise ValueError(f"eviction.{name} is missing.")
        eviction = cls(**given)
        eviction._check()
        return eviction

    def _check(self) -> None:
        kvzap = self.method == "kvzap"
        _one_of("method", self.method, METHODS)
        _integer("window", self.window, 1)
        _one_of("shift", self.shift, (0, 1))
        _one_of("decides", self.decides, ("head", "layer"))
        _one_of("prefill", self.prefill, ("masked",))
        for name in ("bias", "disabled"):
            _one_of(name, getattr(self, name), (False, True))
        if self.hidden_dim is not None:
            _integer("hidden_dim", self.hidden_dim, 1)
        for name, of_kvzap in {"scale": False, "offset": False, "threshold": True}.items():
            value = getattr(self, name)
            if of_kvzap == kvzap and not is_number(value):
                raise ValueError(f"eviction.{name} is {value!r}: {self.method} needs a number.")
            if of_kvzap != kvzap and value is not None:
                raise ValueError(f"eviction.{name} is {value!r}: {self.method} has none, leave it out.")
        if self.hidden_dim is not None and not kvzap:
            raise ValueError(f"eviction.hidden_dim is {self.hidden_dim!r}: {self.method} has none, leave it out.")
        if self.bias and self.method != "dms_adapter":
            raise ValueError(f"eviction.bias is true: {self.method} has none, leave it out.")


def is_number(value: Any) -> bool:
    """Whether a value of a config.json is a number: no bool, infinite or NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is one or (value == one and type(value) is type(one)) for one in allowed):
        raise ValueError(f"eviction.{name} is {value!r}: it must be {' or '.join(map(repr, allowed))}.")


def _integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"eviction.{name} is {value!r}: it must be an integer from {least} on.")


class EvictingDecoderConfig(StrictConfig):
    """A decoder with grouped queries and RoPE, such as Llama, Mistral, Qwen2 or Qwen3, that evicts tokens.

    ``python -m vllm_fox.convert`` writes it. The fields are those of Llama's config, except:

    Args:
        head_dim: size of a head.
        rope_parameters: RoPE's base and scaling, in the form of transformers 5, with a ``rope_type`` of
            :data:`ROPE_FACTORS`.
        attention_bias: whether the attention's output projection has a bias.
        qkv_bias: whether the projections to queries, keys and values have biases.
        qk_norm: whether queries and keys are normed head by head, as in Qwen3.
        eviction: the fields of :class:`Eviction`.
        base_model_type: the model's kind, such as "qwen3", before it learned to evict. It is not read.

    Raises:
        ValueError: a field is unknown or has a value out of range.
    """

    model_type = "evicting_decoder"
    only: ClassVar[dict[str, tuple[Any, ...]]] = {"hidden_act": ("silu",)}

    if TYPE_CHECKING:
        vocab_size: int
        hidden_size: int
        intermediate_size: int
        num_hidden_layers: int
        num_attention_heads: int
        num_key_value_heads: int
        head_dim: int
        max_position_embeddings: int
        rms_norm_eps: float
        rope_parameters: dict[str, Any]
        attention_bias: bool
        qkv_bias: bool
        mlp_bias: bool
        qk_norm: bool
        eviction: dict[str, Any]
        base_model_type: str | None

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        attention_bias: bool = False,
        qkv_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        eviction: dict[str, Any] | None = None,
        base_model_type: str | None = None,
        tie_word_embeddings: bool = False,
        quantization_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers makes a config without arguments to learn the defaults.
        if rope_parameters is None:
            rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        if eviction is None:
            eviction = {
                "method": "dms_borrowed_neuron",
                "window": 512,
                "shift": 1,
                "scale": 100.0,
                "offset": 5.0,
            }
        own = own_fields(EvictingDecoderConfig, locals())
        if quantization_config is None:
            del own["quantization_config"]
        self.hidden_act = "silu"
        super().__init__(own, tie_word_embeddings=own.pop("tie_word_embeddings"), **kwargs)

    def _complete(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{self.model_type} config: {name} is {value!r}: it must be an integer from 1 on.")
        if not _is_positive(self.rms_norm_eps):
            raise ValueError(
                f"{self.model_type} config: rms_norm_eps is {self.rms_norm_eps!r}: it must be a positive number."
            )
        for name in ("attention_bias", "qkv_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{self.model_type} config: {name} is {getattr(self, name)!r}: it must be true or false."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.model_type} config: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        self._check_rope()
        try:
            Eviction.from_dict(self.eviction)
        except ValueError as error:
            raise ValueError(f"{self.model_type} config: {error}") from None

    def _check_rope(self) -> None:
        """Check RoPE's fields before transformers does, which only warns of some and stumbles over others."""
        rope: Any = self.rope_parameters
        found = f"{self.model_type} config: rope_parameters"
        if not isinstance(rope, dict):
            raise ValueError(f"{found} is {rope!r}: it must be an object.")
        kind = rope.get("rope_type", rope.get("type", "default"))  # the second is the name in transformers 4
        if not isinstance(kind, str) or kind not in ROPE_FACTORS:
            raise ValueError(f"{found}.rope_type is {kind!r}: it must be one of {', '.join(ROPE_FACTORS)}.")
        for name in ROPE_FACTORS[kind]:
            value = rope.get(name)
            if kind == "longrope":
                size = self.head_dim // 2
                if not isinstance(value, list) or len(value) != size or not all(map(_is_positive, value)):
                    raise ValueError(
                        f"{found}.{name} is {value!r}: it must be a list of {size} positive numbers, as rope_type "
                        f"{kind!r} needs it."
                    )
            elif not _is_positive(value):
                raise ValueError(
                    f"{found}.{name} is {value!r}: it must be a positive number, as rope_type {kind!r} needs it."
                )
        if "rope_theta" in rope and not _is_positive(rope["rope_theta"]):
            raise ValueError(f"{found}.rope_theta is {rope['rope_theta']!r}: it must be a positive number.")
        original = rope.get("original_max_position_embeddings", 1)
        if isinstance(original, bool) or not isinstance(original, int) or original < 1:
            raise ValueError(
                f"{found}.original_max_position_embeddings is {original!r}: it must be an integer from 1 on."
            )
