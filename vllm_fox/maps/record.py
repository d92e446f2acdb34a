"""The record that a map is drawn from: which queries of a text see which of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class ForgettingMap:
    """One text of T tokens and a model of L layers with S streams each.

    Attributes:
        model: what the model is called.
        family: plural name of its family.
        source: "engine" or "transformers".
        stream: description of a stream, such as "one layer".
        pieces: [T] text of each token; together they are the text.
        ends: [L, S, T] int32, position of the first query that does not see the token any more: it is seen by the
            queries from its own position to ``ends - 1``. T stands for tokens that all queries see.
        page_size: tokens that are dropped together if a stream drops its oldest page as a whole; 1 if it drops
            token by token.
        text_tokens: tokens of the whole text, of which these are the first.
    """

    model: str
    family: str
    source: str
    stream: str
    pieces: list[str]
    ends: np.ndarray
    page_size: int
    text_tokens: int

    @property
    def layers(self) -> int:
        return self.ends.shape[0]

    @property
    def streams(self) -> int:
        """Streams of a layer."""
        return self.ends.shape[1]

    @property
    def tokens(self) -> int:
        return self.ends.shape[2]

    @property
    def flat(self) -> np.ndarray:
        """The ends of all streams, layer by layer: [L * S, T]."""
        return self.ends.reshape(-1, self.tokens)

    def name(self, number: int) -> str:
        """Return the name of a stream of :attr:`flat`."""
        layer, head = divmod(number, self.streams)
        return f"layer {layer}" if self.streams == 1 else f"layer {layer}, head {head}"

    @cached_property
    def live(self) -> np.ndarray:
        """Tokens that each query sees, itself included: [L * S, T] int64."""
        return self.seen_within(self.tokens)

    def seen_within(self, window: int) -> np.ndarray:
        """Return how many of the newest ``window`` tokens each query sees, itself included: [L * S, T] int64."""
        leaves = np.minimum(self.flat, np.arange(self.tokens) + window)
        change = np.ones((len(leaves), self.tokens), dtype=np.int64)
        for mine, ends in zip(change, leaves, strict=True):
            mine -= np.bincount(ends, minlength=self.tokens)[: self.tokens]
        return change.cumsum(1)

    @cached_property
    def seen_share(self) -> np.ndarray:
        """Share of the queries after a token that see it: [L * S, T] float64. The last token, which none follows,
        has 1."""
        position = np.arange(self.tokens)
        later = self.tokens - position - 1
        return np.where(later > 0, (self.flat - position - 1) / np.maximum(later, 1), 1.0)

    @property
    def given_back(self) -> np.ndarray:
        """Share of the places of a cache that never forgets which are free when each query is done: [T], 0 to 1."""
        return 1 - self.live.sum(0) / (len(self.flat) * np.arange(1, self.tokens + 1))

    @property
    def given_back_overall(self) -> float:
        """The same over all queries together."""
        return float(1 - self.live.sum() / (len(self.flat) * self.tokens * (self.tokens + 1) / 2))
