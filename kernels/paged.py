"""What every leaf function is given: the page pool, the page table and the batch of one step.

Words used throughout (see docs/architecture.md):

* A *page* holds ``page_size`` tokens of one KV head of one layer (a *stream*).
* A *slot* is a running request's row in the page table. Slot 0 and page 0 are padding.
* Page ``p`` of a stream holds the tokens at positions ``[p * page_size, (p + 1) * page_size)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

TABLE_CHUNK = 16
"""Pages per table chunk: the page table itself is allocated in pieces of this many entries per stream."""

QUERY_BLOCK = 128
"""Queries of one row and head that prefill computes together; they share one start of the live range."""

LIVE_RANGE_PERIOD = 16
"""A decoding row's live ranges are looked at every so many tokens. A page holds as many or more, so a dead page is
found a fraction of a page late."""

PLAIN_EXP_BOUND = 60.0
"""Logits within +-60 can be exponentiated and summed over a million keys in float32 and bfloat16 as they are."""

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


@dataclass(frozen=True)
class PageFormat:
    """Bytes of one page, the same for every stream of a model.

    A page is ``[K | V | gates | scales | last raw k, v]``, padded to whole rows of K and to 128 bytes, so that
    the pool can also be read as a matrix of rows of d.

    Args:
        page_size: tokens per page.
        head_dim: d.
        dtype: the model's.
        num_gates: query heads that share the KV head; each has its own forget gate.
        token_shift: whether the page keeps the last token's k and v as projected, before token shift and
            QK-norm. The next token, perhaps in another step, mixes with them.
        kv_dtype: of K and V in the page: ``dtype``, or float8 e4m3 with one scale each for the page's K and V.
    """

    page_size: int
    head_dim: int
    dtype: torch.dtype
    num_gates: int
    token_shift: bool
    kv_dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        return self.page_size * self.head_dim * self.kv_dtype.itemsize

    @property
    def gate_bytes(self) -> int:
        return self.num_gates * self.page_size * 4

    @property
    def scale_bytes(self) -> int:
        return 16 if self.kv_dtype == FP8 else 0

    @property
    def last_bytes(self) -> int:
        return 2 * self.head_dim * self.dtype.itemsize if self.token_shift else 0

    @property
    def page_bytes(self) -> int:
        size = 2 * self.kv_bytes + self.gate_bytes + self.scale_bytes + self.last_bytes
        row = max(128, self.head_dim * self.kv_dtype.itemsize)
        return -(-size // row) * row

    def view(self, pool: torch.Tensor) -> Pages:
        """Cut a flat pool of bytes into pages.

        Args:
            pool: uint8, 1-D, contiguous; its length is a multiple of ``page_bytes``.
        """
        raw = pool.view(-1, self.page_bytes)
        num_pages, at = raw.shape[0], 0

        def part(size: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            piece = raw[:, at : at + size].view(dtype).view(num_pages, *shape)
            at += size
            return piece

        return Pages(
            k=part(self.kv_bytes, self.kv_dtype, self.page_size, self.head_dim),
            v=part(self.kv_bytes, self.kv_dtype, self.page_size, self.head_dim),
            gates=part(self.gate_bytes, torch.float32, self.num_gates, self.page_size),
            scales=part(self.scale_bytes, torch.float32, 4)[:, :2] if self.scale_bytes else None,
            last=part(self.last_bytes, self.dtype, 2, self.head_dim) if self.token_shift else None,
        )


@dataclass(frozen=True, eq=False)
class Pages:
    """The page pool as typed views (P pages, N tokens a page, G gates, d head size).

    Attributes:
        k, v: [P, N, d], model dtype or float8. k is final: after token shift, QK-norm and rotation.
        gates: [P, G, N] float32; entry n is the sum of log f over the page's tokens 0..n. The last entry of a
            full page is the page's total. Sums start anew in every page, so a page means the same wherever
            in a sequence it stands.
        scales: [P, 2] float32, powers of two; with float8 pages K is ``k * scales[:, 0]`` and V is
            ``v * scales[:, 1]``. None otherwise.
        last: [P, 2, d], raw k and v of the token written last, or None without token shift.
    """

    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor
    scales: torch.Tensor | None
    last: torch.Tensor | None

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        """K of the pages ``ids`` as float32: [\\*ids, N, d]."""
        return self.k[ids].float() if self.scales is None else self._scaled(self.k, ids, 0)

    def values(self, ids: torch.Tensor) -> torch.Tensor:
        """V of the pages ``ids`` as float32: [\\*ids, N, d]."""
        return self.v[ids].float() if self.scales is None else self._scaled(self.v, ids, 1)

    def _scaled(self, stored: torch.Tensor, ids: torch.Tensor, which: int) -> torch.Tensor:
        assert self.scales is not None
        return stored.view(torch.uint8)[ids].view(FP8).float() * self.scales[ids, which][..., None, None]


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

    def page_ids(self, slots: torch.Tensor, page: torch.Tensor, streams: torch.Tensor) -> torch.Tensor:
        """Page ids at broadcast (slots, page index, stream); any integer dtype, result int64."""
        chunk = self.chunk_of[slots, page // TABLE_CHUNK].long()
        return self.entries[chunk, streams, page % TABLE_CHUNK].long()


@dataclass(frozen=True)
class PrefillWork:
    """Work lists of a step in which some row has several queries; made on the host, int32 on the device.

    Attributes:
        pages: [n, 2] (row, page index) of every page that the step's new tokens of all rows fall into.
        rows: [m] the rows with several queries.
        tiles: [t, 2] (index into ``rows``, query block of that row), ordered by row.
        first_tile: [m + 1] where each row's tiles begin.
        max_pages: pages of the longest of these rows.
    """

    pages: torch.Tensor
    rows: torch.Tensor
    tiles: torch.Tensor
    first_tile: torch.Tensor
    max_pages: int

    @classmethod
    def of(cls, query_lens: np.ndarray, seq_lens: np.ndarray, page_size: int, device: torch.device) -> PrefillWork:
        """Lists for rows of these lengths (host arrays)."""
        rows = np.flatnonzero(query_lens > 1)
        first_page = (seq_lens - query_lens) // page_size
        touched = np.where(query_lens > 0, (seq_lens - 1) // page_size + 1 - first_page, 0)
        blocks = -(-query_lens[rows] // QUERY_BLOCK)
        first_tile = np.concatenate(([0], np.cumsum(blocks)))
        parts = [
            _pairs(np.arange(len(query_lens)), first_page, touched).ravel(),
            rows,
            _pairs(np.arange(len(rows)), np.zeros_like(rows), blocks).ravel(),
            first_tile,
        ]
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        pages, row_ids, tiles, starts = packed.split([len(part) for part in parts])
        longest = int(-(-seq_lens[rows].max() // page_size))
        return cls(pages.view(-1, 2), row_ids, tiles.view(-1, 2), starts, longest)


def _pairs(first: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[(first[i], start[i] + n) for every i and n < count[i]] as an array [sum of count, 2]."""
    which = np.repeat(np.arange(len(first)), count)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count)
    return np.stack((first[which], start[which] + nth), axis=1)


@dataclass(frozen=True)
class Batch:
    """One step's requests (R rows, T tokens), in the order of the token batch.

    Attributes:
        query_start: [R + 1] int32 on the device; row r owns tokens ``query_start[r]:query_start[r + 1]``.
        seq_lens: [R] int32 on the device: tokens of the request after this step.
        slots: [R] int32 on the device; 0 marks a row of padding.
        query_lens_host: the rows' numbers of new tokens, as known on the host.
        seq_lens_host: ``seq_lens`` on the host; empty when every row has one query.
        work: lists for the step's prefill; None when every row has one query.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    query_lens_host: list[int]
    seq_lens_host: list[int]
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
        """A batch with its work lists."""
        work = None
        if any(length > 1 for length in query_lens_host):
            work = PrefillWork.of(np.array(query_lens_host), np.array(seq_lens_host), page_size, seq_lens.device)
        return cls(query_start, seq_lens, slots, list(query_lens_host), list(seq_lens_host), work)

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
