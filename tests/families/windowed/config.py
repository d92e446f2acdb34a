"""The config.json of a windowed decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_fox.config_fields import Fields
from vllm_fox.strict_config import StrictConfig, own_fields


class WindowedConfig(StrictConfig):
    """A decoder without positions.

    Args:
        windows: for each head, how many tokens a query sees, itself included.

    Raises:
        ValueError: a field is unknown or has a value out of range.
    """

    model_type = "windowed"

    if TYPE_CHECKING:
        vocab_size: int
        hidden_size: int
        num_hidden_layers: int
        num_attention_heads: int
        max_position_embeddings: int
        windows: list[int]

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 2,
        max_position_embeddings: int = 1024,
        windows: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        windows = windows or [32] * num_attention_heads
        super().__init__(own_fields(WindowedConfig, locals()), **kwargs)

    def _complete(self) -> None:
        if len(self.windows) != self.num_attention_heads or min(self.windows) < 1:
            allowed = f"{self.num_attention_heads} numbers from 1 on, one for each head"
            Fields.of(self).refuse("windows", allowed)
