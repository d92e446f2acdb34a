"""Keys and values for ``generate``, without those that all heads of a layer have forgotten.

Each layer has one tensor for all heads, so a token is dropped once the slowest head of the layer has forgotten it
in every sequence of the batch. The pages under vLLM do better: they are freed head by head (see
:mod:`vllm_fox.pages`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

DROP = 64
"""Number of tokens that are dropped together, because each time the tokens that are left are copied."""


class ForgettingLayer(CacheLayerMixin):
    """One layer's cache of B sequences, with padding anywhere.

    Args:
        threshold: [H] value of D_ij below which key j is negligible for query i and all later ones; -inf keeps all
            keys.
    """

    is_croppable = False
    is_sliding = False

    def __init__(self, threshold: torch.Tensor) -> None:
        super().__init__()
        self.threshold = threshold
        self.length = 0

    def fill(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        log_forget: torch.Tensor,
        real: torch.Tensor | None,
        last: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Store prompts.

        Args:
            k, v: [B, T, KV heads, d] as attention reads them, and any numbers at padding.
            log_forget: [B, T, H], and any numbers at padding.
            real: [B, T] bool, False at padding; None if there is none.
            last: k and v of the last tokens as they were projected, [B, KV heads, d].
        """
        self.keys, self.values = k.transpose(1, 2), v.transpose(1, 2)
        now, c = self._sums(log_forget, real)
        self.c, self.now, self.last = c, now[:, :, -1], last
        self.length, self.is_initialized = k.shape[1], True
        self._drop(self.now)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_forget: torch.Tensor,
        real: torch.Tensor | None,
        last: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Append new tokens, and map their q [B, T, H, d] to the attention output [B, T, H, d].

        The output at padding is arbitrary. The other arguments are as in :meth:`fill`; ``scale`` is the factor of
        the logits.
        """
        assert self.keys is not None and self.values is not None
        new = q.shape[1]
        now, c = self._sums(log_forget, real)
        now, c = now + self.now[:, :, None], c + self.now[:, :, None]
        self._drop(now[:, :, 0])
        self.keys = torch.cat((self.keys, k.transpose(1, 2)), 2)
        self.values = torch.cat((self.values, v.transpose(1, 2)), 2)
        self.c, self.now, self.last, self.length = torch.cat((self.c, c), 2), now[:, :, -1], last, self.length + new
        held = self.keys.shape[2]
        decay = now[:, :, :, None] - self.c[:, :, None, :]  # [B, H, new, held]
        position = torch.arange(held, device=q.device)
        unseen = (position[held - new :, None] < position) | (decay < self.threshold[:, None, None])
        by_group = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))  # [B, KV heads, G, new, d]
        products = (by_group @ self.keys.transpose(2, 3)[:, :, None]).flatten(1, 2)
        wide = torch.promote_types(products.dtype, torch.float32)
        logits = scale * products.to(wide) + decay.to(wide)
        weights = logits.masked_fill(unseen, -torch.inf).softmax(-1).to(v.dtype)
        out = weights.unflatten(1, (k.shape[2], -1)) @ self.values[:, :, None]
        return out.flatten(1, 2).transpose(1, 2)

    @staticmethod
    def _sums(log_forget: torch.Tensor, real: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return c_t, the sum of all log gates up to t, as queries and as keys have it: [B, H, T] float64.

        As a key, padding has +inf, so that D is -inf there.
        """
        wide = log_forget.double().transpose(1, 2)
        if real is None:
            now = wide.cumsum(-1)
            return now, now
        now = wide.masked_fill(~real[:, None], 0.0).cumsum(-1)
        return now, now.masked_fill(~real[:, None], torch.inf)

    def _drop(self, now: torch.Tensor) -> None:
        """Drop the tokens that a query whose sum of log gates is ``now`` [B, H], and so all later ones, forgot."""
        assert self.keys is not None and self.values is not None
        dead = (now[:, :, None] - self.c < self.threshold[:, None]).all(1).all(0)
        count = int(F.pad(dead, (0, 1)).int().argmin()) // DROP * DROP
        if count:
            # These are copies, because views would keep what was dropped in memory.
            self.keys, self.values, self.c = (x[:, :, count:].clone() for x in (self.keys, self.values, self.c))

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("ForgettingLayer.crop: earlier queries would need keys that were dropped.")

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, dropped ones included."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        if self.keys is None or self.values is None:
            return
        indices = indices.to(self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]
        self.c, self.now = self.c[indices], self.now[indices]
        self.last = (self.last[0][indices], self.last[1][indices])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def reset(self) -> None:
        self.keys = self.values = None
        self.length, self.is_initialized = 0, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is allocated ahead."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("ForgettingLayer.update: gates are needed as well as keys and values: use fill or attend.")


class ForgettingCache(Cache):
    """The cache that ``generate`` carries from token to token.

    Args:
        thresholds: thresholds [H] of each layer.
    """

    def __init__(self, thresholds: list[torch.Tensor]) -> None:
        super().__init__(layers=[ForgettingLayer(threshold) for threshold in thresholds])
        # [B] number of tokens of each sequence so far, without padding: the position for RoPE.
        self.positions: torch.Tensor | None = None
        # [B, hidden] the model's output for the newest token of each sequence.
        self.newest: torch.Tensor | None = None

    def layer(self, index: int) -> ForgettingLayer:
        """Return one layer's part of the cache."""
        layer = self.layers[index]
        assert isinstance(layer, ForgettingLayer)
        return layer

    def held(self) -> list[int]:
        """Return the number of tokens whose keys and values each layer still has."""
        return [
            0 if layer.keys is None else layer.keys.shape[2] for layer in map(self.layer, range(len(self.layers)))
        ]

    def reset(self) -> None:
        super().reset()
        self.positions = self.newest = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.positions is not None and self.newest is not None:
            indices = indices.to(self.positions.device)
            self.positions, self.newest = self.positions[indices], self.newest[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.positions is not None:
            rows = torch.arange(len(self.positions), device=self.positions.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)
