"""Maps made by hand, without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_fox.maps.record import ForgettingMap


def made(ends: np.ndarray, pieces: list[str] | None = None, **fields: Any) -> ForgettingMap:
    """A map with these ends [L, S, T]."""
    tokens = ends.shape[2]
    given: dict[str, Any] = {
        "model": "made-up",
        "family": "Made-up models",
        "source": "transformers",
        "stream": "one KV head of one layer",
        "pieces": pieces or [f"word{n} " for n in range(tokens)],
        "page_size": 1,
        "text_tokens": tokens,
    }
    return ForgettingMap(ends=ends.astype(np.int32), **given | fields)


def windowed(tokens: int, window: int) -> np.ndarray:
    """Ends [T] of a stream whose queries see the newest ``window`` tokens."""
    return np.minimum(np.arange(tokens) + window, tokens)


def random_ends(layers: int, streams: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Ends [L, S, T] at random, a tenth of them at the end of the text: what packs worst."""
    rng = np.random.default_rng(seed)
    position = np.arange(tokens)
    ends = rng.integers(position + 1, tokens + 1, size=(layers, streams, tokens))
    return np.where(rng.random(ends.shape) < 0.1, tokens, ends)
