"""How much attention pruning has saved, as far as the scheduler knows: from lengths and live ranges.

A query of a stream reads pages: from the first live one to the one that it stands in, where dense attention would
start at page 0. Work is counted in such reads, of single queries, over all streams. The scheduler learns of dead
pages after the worker does, so what is counted as pruned is never more than what is. This module does not depend on
vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PREFILL, DECODE = "prefill", "decode"
PHASES = (PREFILL, DECODE)
"""Of a step's requests: those with several new tokens, drafts aside, read a prompt, the others decode."""


@dataclass(frozen=True)
class Prompts:
    """What a step reads of n prompts.

    Attributes:
        slots: [n] the requests' slots.
        before, after: [n] tokens of each request before the step and after it.
        dead: [n] dead pages of each request before the step, summed over its streams.
    """

    slots: np.ndarray
    before: np.ndarray
    after: np.ndarray
    dead: np.ndarray

    def boundaries(self, page_size: int) -> Boundaries:
        """Return the page boundaries that the step's prompts come to, prompt by prompt."""
        low, high = self.before // page_size, self.after // page_size
        counts = high - low
        row = np.repeat(np.arange(len(counts)), counts)
        pages = np.arange(1, len(row) + 1) + np.repeat(low - np.cumsum(counts) + counts, counts)
        queries = np.minimum(self.after[row] - pages * page_size, page_size)
        return Boundaries(self.slots[row], pages, queries, self.dead[row])


@dataclass(frozen=True)
class Boundaries:
    """Page boundaries inside of the prompts that a step reads.

    Attributes:
        slots: [n] the requests' slots.
        pages: [n] full pages of the request at the boundary.
        queries: [n] queries of the step that stand in the page behind it.
        dead: [n] the request's dead pages before the step, summed over its streams.
    """

    slots: np.ndarray
    pages: np.ndarray
    queries: np.ndarray
    dead: np.ndarray


NO_BOUNDARIES = Boundaries(*(np.empty(0, dtype=np.int64) for _ in range(4)))


class WorkCount:
    """Counts of reads since start-up, by phase.

    Args:
        page_size: tokens per page.
        streams: of all ranks.

    Attributes:
        dense: reads of dense attention.
        pruned: those among them that pruning has made needless, at least.
    """

    def __init__(self, page_size: int, streams: int) -> None:
        self._page_size, self._streams = page_size, streams
        self.dense = dict.fromkeys(PHASES, 0)
        self.pruned = dict.fromkeys(PHASES, 0)

    def decode(self, pages: int, live: int) -> None:
        """Count queries of requests that decode, given the pages per stream and the live pages of each, summed."""
        dense = pages * self._streams
        self.dense[DECODE] += dense
        self.pruned[DECODE] += dense - live

    def prefill(self, prompts: Prompts) -> None:
        """Count the queries of prompts. What dies while they are read is not known yet: see :meth:`learn`."""
        dense = self._reads(prompts.after) - self._reads(prompts.before)
        self.dense[PREFILL] += int(dense.sum()) * self._streams
        self.pruned[PREFILL] += int(((prompts.after - prompts.before) * prompts.dead).sum())

    def learn(self, boundaries: Boundaries, dead: np.ndarray) -> None:
        """Count what the queries behind boundaries have been spared besides what was dead before the step.

        Args:
            dead: [n] dead pages at each boundary, summed over the streams.
        """
        self.pruned[PREFILL] += int((boundaries.queries * (dead - boundaries.dead)).sum())

    def _reads(self, tokens: np.ndarray) -> np.ndarray:
        """Pages that dense attention reads in one stream for the first so many queries of a request."""
        full, rest = np.divmod(tokens, self._page_size)
        return (self._page_size * full // 2 + rest) * (full + 1)
