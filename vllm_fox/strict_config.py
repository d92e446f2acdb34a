"""Config classes that refuse fields which they do not know and which could change a model's output."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import GenerationConfig, PretrainedConfig


class StrictConfig(PretrainedConfig):
    """A config that refuses unknown fields, and suggests the known field of similar name if there is one.

    Accepted are fields that transformers or a training writes and that do not change the output; other names of a
    field if they agree with it; and unknown fields that are null or false, since they ask for nothing.

    Attributes:
        aliases: other names of own fields, besides those of ``attribute_map``, and names of properties.
        only: values that a field of other models must have, because the model computes just that.
    """

    aliases: ClassVar[Mapping[str, str]] = {}
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

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
        for name, value in own.items():
            setattr(self, name, value)
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        known = [*own, "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"]
        kept = {name: value for name, value in standard.items() if not self._is_settled(name, value, known)}
        if own:
            self._complete()  # first, so that a mistake is named here and not by a failure of transformers
        for name, value in standard.items():
            self._check_alias(name, value)
        super().__init__(**kept)

    def _is_settled(self, name: str, value: Any, known: list[str]) -> bool:
        """Return whether a field that is not the class's own need not be kept; refuse it if it is a mistake."""
        if name in _OTHER_MODELS and value:
            raise ValueError(f"{self.model_type} config: {name} is {value!r}: it is not supported, leave it out.")
        if name in _STANDARD or name in _TRAINING or name.startswith("_"):
            return False
        if self._real_name(name) is not None or value is None:
            return True
        only = _ONLY | dict(self.only)
        if name in only:
            if value in only[name]:
                return True
            allowed = " or ".join(map(repr, only[name]))
            raise ValueError(f"{self.model_type} config: {name} is {value!r}: only {allowed} is supported.")
        if value is False:
            return True
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        fix = f"did you mean {near[0]}?" if near else f"remove it; the fields are {', '.join(known)}."
        raise ValueError(f"{self.model_type} config: unknown field {name} (value {value!r}): {fix}")

    def _real_name(self, name: str) -> str | None:
        return (self.attribute_map | dict(self.aliases)).get(name)

    def _check_alias(self, name: str, value: Any) -> None:
        real = self._real_name(name)
        if real is None or value is None or value == getattr(self, real):
            return
        found = f"{self.model_type} config: {name} is {value!r}"
        if real == name:
            raise ValueError(f"{found}, but it follows from others and is {getattr(self, real)!r}: leave it out.")
        raise ValueError(
            f"{found}, but {real}, another name for the same, is {getattr(self, real)!r}: give {real} alone."
        )

    def check(self) -> None:
        """Check the fields once more: transformers sets those that ``from_pretrained`` is given late.

        Raises:
            ValueError: a field has a value that it cannot have; the message names both.
        """
        self._complete()

    def _complete(self) -> None:
        """Check the fields and set those that follow from them. Subclasses override this; here it does nothing."""


_OTHER_MODELS = frozenset(
    ["add_cross_attention", "is_encoder_decoder", "per_layer_config", "pruned_heads", "tie_encoder_decoder"]
)
"""Standard fields that change a model unless they are null, false or empty."""


def own_fields(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return the named arguments of ``cls.__init__`` with their values, in order."""
    names = [
        name
        for name, parameter in inspect.signature(cls.__init__).parameters.items()  # type: ignore[misc]
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD and name != "self"
    ]
    return {name: values[name] for name in names}


def _standard_fields() -> frozenset[str]:
    """Return the fields that any config.json may have: those of transformers now, or of its 4.x releases."""
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


def _names_of_training() -> list[str]:
    names = """
        attention_dropout attn_pdrop dropout embd_pdrop fuse_cross_entropy fuse_linear_cross_entropy fuse_norm
        fuse_swiglu gradient_checkpointing hidden_dropout initializer_range resid_pdrop rescale_layer use_cache
        use_l2warp
    """
    return names.split()


_STANDARD = _standard_fields()
_ONLY: dict[str, tuple[Any, ...]] = {"is_causal": (True,)}
"""What all our models do."""
_TRAINING = frozenset(_names_of_training())
"""Fields of training and of kernels, which do not change what a model computes."""
