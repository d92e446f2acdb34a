"""Config classes that refuse unknown fields."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from typing import Any

from transformers import GenerationConfig, PretrainedConfig


class StrictConfig(PretrainedConfig):
    """A config that refuses unknown fields, and suggests the known field of similar name if there is one."""

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
        """Check the fields and set those that follow from them. Subclasses override this; here it does nothing."""


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


_STANDARD = _standard_fields()
