"""What the models of all families do with the arguments that every model of transformers has."""

from __future__ import annotations

from typing import Any

import torch


def tokens_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """Return whichever of input_ids [B, T] and inputs_embeds [B, T, hidden] is given.

    Raises:
        ValueError: both or neither are given, or the shape is another.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either input_ids or inputs_embeds.")
    if inputs_embeds is not None:
        if inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds is {list(inputs_embeds.shape)}: it must be [B, T, hidden].")
        return inputs_embeds
    assert input_ids is not None
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids is {list(input_ids.shape)}: it must be [B, T].")
    return input_ids


def wants_hidden_states(config: Any, output_hidden_states: bool | None, output_attentions: bool | None) -> bool:
    """Return whether the caller, or else the config, asks for the hidden states of all layers.

    Raises:
        ValueError: attention weights are asked for.
    """
    if config.output_attentions if output_attentions is None else output_attentions:
        raise ValueError(
            "output_attentions is true: leave it out, these models never hold attention weights in memory."
        )
    return bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)


def kept_positions(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """Return the index of the positions whose logits are asked for: the last so many (0: all), or these."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
