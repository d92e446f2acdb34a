"""What every leaf function is given: the page pool, the page table and the batch of one step.

Words used throughout (see docs/architecture.md):

* A *page* holds ``page_size`` tokens of one KV head of one layer (a *stream*).
* A *slot* is a running request's row in the page table. Slot 0 and page 0 are padding.
* Page ``p`` of a stream holds the tokens at positions ``[p * page_size, (p + 1) * page_size)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TABLE_CHUNK = 16
"""Pages per table chunk: the page table itself is allocated in pieces of this many entries per stream."""


@dataclass(frozen=True)
class PageFormat:
    """Bytes of one page, the same for every stream of a model.

    A page is ``[K | V | gates | last raw k, v]`` and is padded to a multiple of 128 bytes.

    Args:
        page_size: tokens per page.
        head_dim: d.
        dtype: of K and V.
        num_gates: query heads that share the KV head; each has its own forget gate.
        token_shift: whether the page keeps the last token's k and v as projected, before token shift and
            QK-norm. The next token, perhaps in another step, mixes with them.
    """

    page_size: int
    head_dim: int
    dtype: torch.dtype
    num_gates: int
    token_shift: bool

    @property
    def kv_bytes(self) -> int:
        return self.page_size * self.head_dim * self.dtype.itemsize

    @property
    def gate_bytes(self) -> int:
        return self.num_gates * self.page_size * 4

    @property
    def last_bytes(self) -> int:
        return 2 * self.head_dim * self.dtype.itemsize if self.token_shift else 0

    @property
    def page_bytes(self) -> int:
        return -(-(2 * self.kv_bytes + self.gate_bytes + self.last_bytes) // 128) * 128

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
            k=part(self.kv_bytes, self.dtype, self.page_size, self.head_dim),
            v=part(self.kv_bytes, self.dtype, self.page_size, self.head_dim),
            gates=part(self.gate_bytes, torch.float32, self.num_gates, self.page_size),
            last=part(self.last_bytes, self.dtype, 2, self.head_dim) if self.token_shift else None,
        )


@dataclass(frozen=True)
class Pages:
    """The page pool as typed views (P pages, N tokens a page, G gates, d head size).

    Attributes:
        k, v: [P, N, d], model dtype. k is final: after token shift, QK-norm and rotation.
        gates: [P, G, N] float32; entry n is the sum of log f over the page's tokens 0..n. The last entry of a
            full page is the page's total. Sums start anew in every page, so a page means the same wherever
            in a sequence it stands.
        last: [P, 2, d], raw k and v of the token written last, or None without token shift.
    """

    k: torch.Tensor
    v: torch.Tensor
    gates: torch.Tensor
    last: torch.Tensor | None

    @property
    def page_size(self) -> int:
        return self.k.shape[1]


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
        """Page ids at broadcast (slots, page index, stream); all int64, result int64."""
        chunk = self.chunk_of[slots, page // TABLE_CHUNK].long()
        return self.entries[chunk, streams, page % TABLE_CHUNK].long()


@dataclass(frozen=True)
class Batch:
    """One step's requests (R rows, T tokens), in the order of the token batch.

    Attributes:
        query_start: [R + 1] int64 on the device; row r owns tokens ``query_start[r]:query_start[r + 1]``.
        seq_lens: [R] int64 on the device: tokens of the request after this step.
        slots: [R] int64 on the device.
        query_lens_host, seq_lens_host: the same lengths as Python ints.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    slots: torch.Tensor
    query_lens_host: list[int]
    seq_lens_host: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens_host)

    @property
    def num_rows(self) -> int:
        return len(self.query_lens_host)
