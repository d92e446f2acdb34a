"""The config class of decoders that evict tokens."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_fox.config_fields import Fields, is_positive
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
        return cls.of(Fields("", {"eviction": given}))

    @classmethod
    def of(cls, config: Fields) -> Eviction:
        """Check the field of a config, and return it. See :meth:`from_dict`."""
        given = config.inside("eviction")
        given.known([one.name for one in fields(cls)])
        check = given.with_defaults({one.name: one.default for one in fields(cls) if one.default is not MISSING})
        check.one_of("method", METHODS)
        check.integers("window")
        check.one_of("shift", (0, 1))
        check.one_of("decides", ("head", "layer"))
        check.one_of("prefill", ("masked",))
        check.flags("bias", "disabled")
        check.integers("hidden_dim", optional=True)
        method, of_dms, of_kvzap = check.values["method"], ("scale", "offset"), ("threshold",)
        kvzap, why = method == "kvzap", f"with method {method!r}"
        check.numbers(*(of_kvzap if kvzap else of_dms), why=why)
        for name in of_dms if kvzap else (*of_kvzap, "hidden_dim"):
            check.one_of(name, (None,), why)
        if method != "dms_adapter":
            check.one_of("bias", (False,), why)
        return cls(**given.values)


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
        check = Fields.of(self)
        check.integers("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check.integers("num_key_value_heads", "head_dim", "max_position_embeddings")
        check.positive("rms_norm_eps")
        check.flags("attention_bias", "qkv_bias", "mlp_bias", "qk_norm", "tie_word_embeddings")
        check.divides("num_key_value_heads", "num_attention_heads")
        self._check_rope(check.inside("rope_parameters"))
        Eviction.of(check)

    def _check_rope(self, given: Fields) -> None:
        """Check RoPE's fields before transformers does, which only warns of some and stumbles over others."""
        check = given.with_defaults(
            {
                "rope_type": given.values.get("type", "default"),  # as transformers 4 called it
                "rope_theta": 10000.0,
                "original_max_position_embeddings": self.max_position_embeddings,
            }
        )
        check.one_of("rope_type", tuple(ROPE_FACTORS))
        check.positive("rope_theta")
        check.integers("original_max_position_embeddings")
        kind, size = check.values["rope_type"], self.head_dim // 2
        if kind != "longrope":
            check.positive(*ROPE_FACTORS[kind], why=f"with rope_type {kind!r}")
            return
        for name in ROPE_FACTORS[kind]:
            value = check.values.get(name)
            if not isinstance(value, list) or len(value) != size or not all(map(is_positive, value)):
                check.refuse(name, f"a list of {size} positive numbers", f"with rope_type {kind!r}")
