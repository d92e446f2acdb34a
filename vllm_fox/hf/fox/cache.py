"""Keys and values for ``generate``, without those that all heads of a layer have forgotten.

One tensor a layer, so a token goes when the layer's slowest head has forgotten it in every sequence of the batch;
vLLM's pages do better, a head at a time (see :mod:`vllm_fox.pages`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

DROP = 64
"""Tokens that are dropped together: each time what is left is copied."""


class ForgettingLayer(CacheLayerMixin):
    """One layer's cache of B sequences, padded on the left to the same length.

    Args:
        threshold: [H] D_ij below which key j counts for nothing, for the current query and all later ones; -inf
            keeps all.
    """

    is_croppable = False
    is_sliding = False

    def __init__(self, threshold: torch.Tensor) -> None:
        super().__init__()
        self.threshold = threshold
        self.length = 0

    def fill(
        self, k: torch.Tensor, v: torch.Tensor, log_forget: torch.Tensor, last: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Take over prompts.

        Args:
            k, v: [B, T, KV heads, d] as attention reads them.
            log_forget: [B, T, H]; -inf at padding, which stands on the left.
            last: k and v of the last tokens as they were projected, [B, KV heads, d].
        """
        self.keys, self.values = k.transpose(1, 2), v.transpose(1, 2)
        # c_t, the sum of all log gates up to t: of padding +inf, so that D is -inf there.
        padding = torch.isneginf(log_forget)
        c = log_forget.double().masked_fill(padding, 0.0).cumsum(1).masked_fill(padding, torch.inf)
        self.c, self.last = c.transpose(1, 2), last
        self.length, self.is_initialized = k.shape[1], True
        self._drop()

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_forget: torch.Tensor,
        last: tuple[torch.Tensor, torch.Tensor],
        scale: float,
    ) -> torch.Tensor:
        """Append new tokens, and attend from them: [B, T, H, d] to the same; arguments as in :meth:`fill`."""
        assert self.keys is not None and self.values is not None
        batch, new, heads, dim = q.shape
        c = self.c[:, :, -1:] + log_forget.double().transpose(1, 2).cumsum(-1)
        self.keys = torch.cat((self.keys, k.transpose(1, 2)), 2)
        self.values = torch.cat((self.values, v.transpose(1, 2)), 2)
        self.c, self.last, self.length = torch.cat((self.c, c), 2), last, self.length + new
        self._drop(new)
        held = self.keys.shape[2]
        decay = c[:, :, :, None] - self.c[:, :, None, :]  # [B, H, new, held]
        position = torch.arange(held, device=q.device)
        unseen = (position[held - new :, None] < position) | (decay < self.threshold[:, None, None])
        by_group = q.transpose(1, 2).unflatten(1, (k.shape[2], -1))  # [B, KV heads, G, new, d]
        logits = scale * (by_group @ self.keys.transpose(2, 3)[:, :, None]).flatten(1, 2).float() + decay.float()
        weights = logits.masked_fill(unseen, -torch.inf).softmax(-1).to(v.dtype)
        out = weights.unflatten(1, (k.shape[2], -1)) @ self.values[:, :, None]
        return out.flatten(1, 2).transpose(1, 2)

    def _drop(self, new: int = 1) -> None:
        """Let go of what the first of ``new`` queries, and so all after it, have forgotten in all heads."""
        assert self.keys is not None and self.values is not None
        query = self.c[:, :, self.c.shape[2] - new, None]
        dead = (query - self.c < self.threshold[:, None]).all(1).all(0)
        count = int(dead.int().argmin()) // DROP * DROP
        if count:
            # Copies: a view would keep what was dropped.
            self.keys, self.values, self.c = (x[:, :, count:].clone() for x in (self.keys, self.values, self.c))

    def get_seq_length(self) -> int:
        """Tokens so far, dropped ones included."""
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences, in this order."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values, self.c = self.keys[indices], self.values[indices], self.c[indices]
        self.last = (self.last[0][indices], self.last[1][indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        assert self.keys is not None
        self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

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
    """What ``generate`` carries from token to token.

    Args:
        thresholds: [H] of each layer.
    """

    def __init__(self, thresholds: list[torch.Tensor]) -> None:
        super().__init__(layers=[ForgettingLayer(threshold) for threshold in thresholds])
        # [B] real tokens of each sequence so far, which RoPE counts.
        self.positions: torch.Tensor | None = None

    def layer(self, index: int) -> ForgettingLayer:
        """One layer's part."""
        layer = self.layers[index]
        assert isinstance(layer, ForgettingLayer)
        return layer

    def held(self) -> list[int]:
        """Tokens whose keys and values each layer still has."""
        return [
            0 if layer.keys is None else layer.keys.shape[2] for layer in map(self.layer, range(len(self.layers)))
        ]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.positions is not None:
            self.positions = self.positions[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)
