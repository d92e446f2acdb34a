"""``generate`` for models that take padding out of their batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin


class PackingGenerationMixin(GenerationMixin):
    """transformers' ``generate``, with prompts that are padded on the right as well as on the left.

    The models' last column has the newest token of every row, so there is nothing else to do than to count
    positions by the mask: transformers counts on from the last column, which may be padding.
    """

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def new_cache(self) -> Cache | None:
        """Make an empty cache, or return None if the model computes all tokens anew each time."""
        return None

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if (kind := generation_config.cache_implementation) not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}: leave it out, {type(self).__name__} has its own.")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)  # type: ignore[misc]
        model: Any = self
        if model.is_gradient_checkpointing and model.training:
            generation_config.use_cache = False
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            if (cache := self.new_cache()) is not None:
                model_kwargs["past_key_values"] = cache
            generation_config.use_cache = cache is not None

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        mask, positions = updated.get("attention_mask"), updated.get("position_ids")
        if mask is not None and positions is not None:
            updated["position_ids"] = torch.cat((positions[:, :-1], mask.sum(1, keepdim=True) - 1), 1)
        return updated


class RecomputingMixin:
    """``generate`` for models without a cache. It goes before :class:`PackingGenerationMixin` among the bases."""

    if TYPE_CHECKING:

        def get_input_embeddings(self) -> nn.Module: ...

    def prepare_inputs_for_generation(
        self,
        input_ids: Any,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return all tokens: ``generate`` computes them anew for each new token, as only a server has a cache."""
        if inputs_embeds is not None:
            # The prompt may be given as input_ids as well.
            new = kwargs["position_ids"].shape[1] - inputs_embeds.shape[1]
            added = self.get_input_embeddings()(input_ids[:, input_ids.shape[1] - new :])
            inputs_embeds = torch.cat((inputs_embeds, added), 1)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, None, past_key_values, attention_mask, inputs_embeds, inputs_embeds is not None, **kwargs
        )
