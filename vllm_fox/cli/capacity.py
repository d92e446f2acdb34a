"""How many requests of a model fit into GPUs at a time, without an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from vllm_fox.kernels.paged import TABLE_CHUNK
from vllm_fox.pages.geometry import TABLE_SHARE, PageGeometry, chunks_of

from .facts import Facts

UTILIZATION = 0.92
"""vLLM's default for --gpu-memory-utilization."""
RESERVE_GIB = 3.0
"""GiB kept for activations and CUDA graphs, which vLLM measures when it starts and this program cannot know."""
CHUNK = 8192
"""Tokens of a prompt that a step reads: vLLM's default for servers on GPUs with 70 GiB or more."""


class Limit(StrEnum):
    """What keeps further requests out."""

    WEIGHTS = "weights"
    MEMORY = "KV memory"
    TABLE = "page table"
    SLOTS = "--max-num-seqs"


@dataclass(frozen=True)
class Fit:
    """How many requests run at a time, and why not more."""

    requests: int
    limit: Limit


@dataclass(frozen=True)
class Capacity:
    """A model on GPUs of one size.

    Attributes:
        facts: the model.
        memory: GiB of a GPU.
        ranks, stages: tensor-parallel size, and number of pipeline stages. The fullest rank decides; weights are
            taken to be shared out equally.
        max_num_seqs: most requests that the engine lets run; None for as many as fit.
    """

    facts: Facts
    memory: float
    ranks: int = 1
    stages: int = 1
    max_num_seqs: int | None = None

    @property
    def kv_bytes(self) -> int:
        """Bytes for KV on a GPU; negative if the weights do not fit."""
        weights = (self.facts.weights_bytes or 0) / (self.ranks * self.stages)
        return int((self.memory * UTILIZATION - RESERVE_GIB) * 2**30 - weights)

    @property
    def _layers(self) -> int:
        """Layers of the largest stage."""
        return math.ceil(self.facts.layers / self.stages)

    @property
    def _streams(self) -> int:
        """Streams of a layer on a rank."""
        return max(1, self.facts.streams // self.facts.layers // self.ranks)

    def dense(self, tokens: int) -> Fit:
        """Return how many requests fit that forget nothing."""
        return self._fit(tokens, self._dense_pages(tokens))

    def pruned_at_least(self, tokens: int) -> Fit | None:
        """Return how many fit whatever their text; None if that is not known."""
        pages = self.facts.pages_at_most(tokens)
        if pages is None:
            return None
        # Whichever heads come to a rank, and layers to a stage, it holds no more than the largest ones.
        width = self.facts.streams // self.facts.layers
        layers = [sorted(pages[at : at + width])[-self._streams :] for at in range(0, len(pages), width)]
        return self._fit(tokens, sum(sorted(map(sum, layers))[-self._layers :]))

    def pruned_measured(self, tokens: int, live_share: float) -> Fit:
        """Return how many fit whose live share is as measured, in all streams alike."""
        return self._fit(tokens, max(1, math.ceil(live_share * self._dense_pages(tokens))))

    def _dense_pages(self, tokens: int) -> int:
        return self._layers * self._streams * math.ceil(tokens / self.facts.page_size)

    def _fit(self, tokens: int, pages: int) -> Fit:
        """How many requests fit that hold so many pages on the fullest rank."""
        if self.kv_bytes <= 0:
            return Fit(0, Limit.WEIGHTS)
        page_bytes = self.facts.page_bytes_on(self.ranks)
        # Of equal numbers the first is named: the page table has no more entries than these requests need.
        fits = {} if self.max_num_seqs is None else {Limit.SLOTS: self.max_num_seqs}
        if self.facts.family is None:
            fits[Limit.MEMORY] = self.kv_bytes // (pages * page_bytes)
        else:
            # The chunk of a prompt that is being read is held besides.
            chunk = self._dense_pages(min(CHUNK, tokens)) if pages < self._dense_pages(tokens) else 0
            fitting = int(self.kv_bytes * (1 - TABLE_SHARE)) // page_bytes - chunk
            fits[Limit.MEMORY] = max(0, fitting) // pages
            fits[Limit.TABLE] = self._fit_into_table(tokens, page_bytes, fits[Limit.MEMORY])
        limit = min(fits, key=lambda one: fits[one])
        return Fit(fits[limit], limit)

    def _fit_into_table(self, tokens: int, page_bytes: int, slots: int) -> int:
        """How many requests the page table has entries for."""
        streams, page_size = self._layers * self._streams, self.facts.page_size
        longest = max(tokens, self.facts.longest_context)
        blocks = self.kv_bytes // (streams * page_bytes)
        # An engine without a limit of its own would be given one for what fits.
        slots = self.max_num_seqs or max(slots, 1)
        chunks = PageGeometry.sized([streams], page_bytes, page_size, slots, longest, blocks).num_chunks - 1
        windows = self.facts.windows
        needed = chunks_of(tokens, page_size)
        if windows and None not in windows:
            # From the chunk with the oldest live page of any stream to that with the newest.
            held = math.ceil(max(window for window in windows if window is not None) / page_size) + 2
            needed = min(needed, math.ceil(held / TABLE_CHUNK) + 1)
        return chunks // needed
