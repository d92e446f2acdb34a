"""What every leaf function over pages is given besides the pages: the page table and the batch of one step.

Words used throughout (see docs/architecture.md):

* A *stream* is what pages belong to: one KV head of one layer, or one layer where its heads share what they keep.
* A *page* holds ``page_size`` tokens of one stream.
* A *slot* is a running request's row in the page table. Slot 0 and page 0 are padding.
* Page ``p`` of a stream holds the tokens at positions ``[p * page_size, (p + 1) * page_size)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .native import NativeBatch, NativeTable

TABLE_CHUNK = 16
"""The page table itself is allocated in chunks of so many entries, one a page, per stream."""

QUERY_BLOCK = 128
"""Prefill computes so many queries of a row and head together; they share one start of the live range."""


@dataclass(frozen=True)
class PageTable:
    """Where each running request's pages are (on the device).

    Attributes:
        chunk_of: [slots, chunks a request] int32: table chunk that holds entries
            ``[c * TABLE_CHUNK, (c + 1) * TABLE_CHUNK)`` of the slot's request.
        entries: [chunks, streams, TABLE_CHUNK] int32 page ids.
        first_live: [slots, streams] int32: all pages before it were proved dead by an earlier query, may have
            been given to other requests, and must not be read. Only moves forward.
    """

    chunk_of: torch.Tensor
    entries: torch.Tensor
    first_live: torch.Tensor

    @property
    def device(self) -> torch.device:
        return self.entries.device

    @cached_property
    def native(self) -> NativeTable:
        """The table as C++ takes it, on a CPU."""
        chunks, streams = self.chunk_of.shape[1], self.first_live.shape[1]
        filled: NativeTable = NativeTable.keeping(self.chunk_of, chunks, self.entries, streams, self.first_live)
        return filled

    def page_ids(self, slots: torch.Tensor, page: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
        """Page ids at broadcast (slots, page index, stream); any integer dtype, result int64."""
        chunk = self.chunk_of[slots, page // TABLE_CHUNK].long()
        return self.entries[chunk, streams, page % TABLE_CHUNK].long()


@dataclass(frozen=True)
class PrefillWork:
    """Work lists of a step in which some row has several queries; made on the host, int32 on the device.

    Attributes:
        pages: [n, 2] (row, how many pages behind that of the row's first new token) of every page that the step's
            new tokens of all rows may fall into. A row's last one may be left empty: only the device knows for
            certain where its tokens stand.
        rows: [m] the rows with several queries.
        tiles: [t, 2] (index into ``rows``, query block of that row), ordered by row.
        first_tile: [m + 1] where each row's tiles begin.
        max_pages: pages of the longest of these rows, or more.
    """

    pages: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor
    first_tile: torch.Tensor
    max_pages: int

    @classmethod
    def of(cls, query_lens: np.ndarray, seq_lens: np.ndarray, page_size: int, device: torch.device) -> PrefillWork:
        """Lists for rows of these lengths (host arrays), of which ``seq_lens`` may be too large."""
        rows = np.flatnonzero(query_lens > 1)
        # The first token may be the last one of its page.
        touched = np.where(query_lens > 0, (query_lens + 2 * page_size - 2) // page_size, 0)
        blocks = -(-query_lens[rows] // QUERY_BLOCK)
        first_tile = np.concatenate(([0], np.cumsum(blocks)))
        parts = [
            _pairs(np.arange(len(query_lens)), touched).ravel(),
            rows,
            _pairs(np.arange(len(rows)), blocks).ravel(),
            first_tile,
        ]
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        pages, row_ids, tiles, starts = packed.split([len(part) for part in parts])
        longest = int(-(-seq_lens[rows].max() // page_size))
        return cls(pages.view(-1, 2), row_ids, tiles.view(-1, 2), starts, longest)


def _pairs(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[(first[i], n) for every i and n < count[i]] as an array [sum of count, 2]."""
    which = np.repeat(np.arange(len(first)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    return np.stack((first[which], nth), axis=1)


@dataclass(frozen=True)
class Batch:
    """One step's requests (R rows, T tokens), in the order of the token batch.

    Attributes:
        query_start: [R + 1] int32 on the device; row r owns tokens ``query_start[r]:query_start[r + 1]``.
        seq_lens: [R] int32 on the device: tokens of the request after this step.
        slots: [R] int32 on the device; 0 marks a row of padding.
        query_lens_host: the rows' numbers of new tokens, as known on the host.
        work: lists for the step's prefill; None when every row has one query.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    query_lens_host: list[int]
    work: PrefillWork | None

    @classmethod
    def of(
        cls,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        slots: torch.Tensor,
        query_lens_host: Sequence[int],
        seq_lens_host: Sequence[int],
        page_size: int,
    ) -> Batch:
        """A batch with its work lists.

        Args:
            seq_lens_host: upper bounds of ``seq_lens``, as known on the host. They are not read, and may be
                missing, when every row has one query.
        """
        work = None
        if any(length > 1 for length in query_lens_host):
            work = PrefillWork.of(np.array(query_lens_host), np.array(seq_lens_host), page_size, seq_lens.device)
        return cls(query_start, seq_lens, slots, list(query_lens_host), work)

    # Asked for in every layer.
    @cached_property
    def num_tokens(self) -> int:
        return sum(self.query_lens_host)

    @property
    def num_rows(self) -> int:
        return len(self.query_lens_host)

    @cached_property
    def has_decode(self) -> bool:
        return 1 in self.query_lens_host

    # What a CPU needs in every layer. Kernels find it out for themselves.
    @cached_property
    def native(self) -> NativeBatch:
        """The batch as C++ takes it, on a CPU."""
        parts = (x.contiguous() for x in (self.query_start, self.seq_lens, self.slots))
        filled: NativeBatch = NativeBatch.keeping(*parts, self.num_rows)
        return filled

    @cached_property
    def single_rows(self) -> torch.Tensor:
        """The rows with one query, int64."""
        rows = [row for row, count in enumerate(self.query_lens_host) if count == 1]
        return torch.tensor(rows, device=self.seq_lens.device)

    @cached_property
    def row_of(self) -> torch.Tensor:
        """[T] int64: each token's row."""
        if self.work is None:
            return self.single_rows
        counts = torch.tensor(self.query_lens_host, device=self.seq_lens.device)
        return torch.repeat_interleave(counts, output_size=self.num_tokens)

    @cached_property
    def first_position(self) -> torch.Tensor:
        """[R] int64: where the first new token of each row stands in its request."""
        return self.seq_lens.long() - self.query_start.diff()

    @cached_property
    def position(self) -> torch.Tensor:
        """[T] int64: where each token stands in its request."""
        token = torch.arange(self.num_tokens, device=self.seq_lens.device)
        return token + (self.first_position - self.query_start[:-1])[self.row_of]
