"""Pages of a stream of which a subset of tokens is live, as in Dynamic Context Pruning (DCP).

Such a page keeps, for every token, its position and the position of the first query that does not see it any more.
Tokens stand where they were written, position by position, until :mod:`.compaction` moves old ones into the places
of dropped ones.

A layer has S streams, and its layer's index i on the worker gives them the numbers ``[i * S, (i + 1) * S)``. A
stream is H KV heads that share what they drop, each with G query heads: all heads of a layer (S = 1), one KV head
with its group (H = 1), or anything between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from ..float8 import FP8
from ..native import Part
from ..paged import QUERY_BLOCK, Batch, PageTable

SCALE_DTYPE = torch.bfloat16
"""It has all powers of two that float32 has."""

NEVER = 2**31 - 1
"""This is the end of a token that nothing has been decided about: no query drops it yet."""


@dataclass(frozen=True)
class SubsetPageFormat:
    """Bytes of one page: ``[K | V | interaction keys | begin | end | scales]``, padded to 128 bytes.

    Args:
        page_size: tokens per page.
        heads: H, KV heads of a stream.
        head_dim: d.
        int_dim: r, size of an interaction key; 0 where streams have none.
        dtype: the model's.
        kv_dtype: of K and V in the page: ``dtype``, or float8 e4m3 with a scale for each token's K and V of each
            head. Tokens move from page to page, so they cannot share one.
    """

    page_size: int
    heads: int
    head_dim: int
    int_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        kv, keys = 2 * self.heads * self.head_dim * self.kv_dtype.itemsize, self.int_dim * self.dtype.itemsize
        scales = 2 * self.heads * SCALE_DTYPE.itemsize if self.kv_dtype == FP8 else 0
        return -(-self.page_size * (kv + keys + 8 + scales) // 128) * 128

    def view(self, pool: torch.Tensor) -> SubsetPages:
        """Cut a flat pool of bytes into pages.

        Args:
            pool: uint8, 1-D, contiguous; its length is a multiple of ``page_bytes``.
        """
        raw, at = pool.view(-1, self.page_bytes), 0

        def part(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            nonlocal at
            size = self.page_size * dtype.itemsize
            for n in shape:
                size *= n
            piece = raw[:, at : at + size].view(dtype).view(len(raw), self.page_size, *shape)
            at += size
            return piece

        return SubsetPages(
            k=part(self.kv_dtype, self.heads, self.head_dim),
            v=part(self.kv_dtype, self.heads, self.head_dim),
            int_k=part(self.dtype, self.int_dim),
            begin=part(torch.int32),
            end=part(torch.int32),
            scales=part(SCALE_DTYPE, self.heads, 2) if self.kv_dtype == FP8 else None,
        )


class NativePages(ctypes.Structure):
    """``Pages`` of pages.hpp."""

    _fields_ = [(name, Part) for name in ("k", "v", "int_k", "begin", "end")]


@dataclass(frozen=True, eq=False)
class SubsetPages:
    """The page pool as typed views: P pages of N tokens, H KV heads of size d a stream, interaction keys of size r.

    A token is visible to the queries at positions ``begin`` to ``end - 1``. Once the next query stands at ``end``
    or behind it, the token is dropped: nothing reads it again, and its place is free. Places of the newest page
    hold anything until a token has been written to them; in all other pages every place has been written.

    Attributes:
        k, v: [P, N, H, d], the model's dtype or float8.
        int_k: [P, N, r].
        begin: [P, N] int32, the token's position.
        end: [P, N] int32, position of the first query that does not see it; :data:`NEVER` while none is known.
        scales: [P, N, H, 2] of :data:`SCALE_DTYPE`, powers of two. With float8 pages K is ``k * scales[..., 0]``
            and V is ``v * scales[..., 1]``. None otherwise.
    """

    k: torch.Tensor
    v: torch.Tensor
    int_k: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    scales: torch.Tensor | None

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def device(self) -> torch.device:
        return self.k.device

    @property
    def dtype(self) -> torch.dtype:
        """Of stored K and V."""
        return self.k.dtype

    @cached_property
    def native(self) -> NativePages:
        """The pages as C++ takes them, on a CPU."""
        return NativePages(*(Part.of(x) for x in (self.k, self.v, self.int_k, self.begin, self.end)))

    def keys(self, *at: torch.Tensor) -> torch.Tensor:
        """K as float32 of tokens at (page, offset), [\\*page, H, d], or of whole pages: [\\*page, N, H, d]."""
        return self._scaled(self.k, at, 0)

    def values(self, *at: torch.Tensor) -> torch.Tensor:
        """V as float32 of tokens at (page, offset), [\\*page, H, d], or of whole pages: [\\*page, N, H, d]."""
        return self._scaled(self.v, at, 1)

    def _scaled(self, stored: torch.Tensor, at: tuple[torch.Tensor, ...], which: int) -> torch.Tensor:
        if self.scales is None:
            return picked(stored, *at).float()
        # PyTorch has no indexing of float8.
        raw = picked(stored.view(torch.uint8), *at).view(stored.dtype).float()
        return raw * picked(self.scales, *at)[..., which].float()[..., None]


def picked(stored: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
    """``stored[at]``. On a CPU index_select copies whole pages, where indexing copies number by number."""
    if len(at) > 1:
        return stored[at]
    return stored.index_select(0, at[0].flatten()).view(*at[0].shape, *stored.shape[1:])


@dataclass(frozen=True)
class Evictions:
    """What is decided, at each token of a step, about a token: whether it goes when it leaves its window.

    Attributes:
        evicts: [T, S] bool, dense within a token.
        window: W from 1 on: an evicted token at position j is visible to the queries up to ``j + W``, so its end is
            ``j + W + 1``.
        lag: 0 if a token decides about itself, 1 if about the token before it. Nothing is decided about the token
            before the first.
    """

    evicts: torch.Tensor
    window: int
    lag: int


def rows_of(batch: Batch, least: int) -> Iterator[tuple[int, slice, int]]:
    """Rows with so many queries or more: (row, its tokens, tokens of the request after the step)."""
    if least > 1 and batch.work is None:
        return
    start = 0
    lengths = batch.seq_lens.tolist()
    for row, (count, length) in enumerate(zip(batch.query_lens_host, lengths, strict=True)):
        if count >= least:
            yield row, slice(start, start + count), length
        start += count


def query_blocks(tokens: slice, length: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """A row's tokens in blocks of :data:`..paged.QUERY_BLOCK`, with their positions."""
    behind = length - tokens.stop
    for start in range(tokens.start, tokens.stop, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, tokens.stop))
        yield block, torch.arange(block.start + behind, block.stop + behind)


def places(pages: SubsetPages, table: PageTable, slot: torch.Tensor, length: int, stream: int) -> torch.Tensor:
    """[n, N] flat indices (page * N + offset) of the places of a request's pages in one stream, oldest page first,
    -1 where no token has been written yet."""
    size, device = pages.page_size, pages.k.device
    newest = (length - 1) // size
    first = min(int(table.first_live[slot, stream]), newest)
    page = torch.arange(first, newest + 1, device=device)
    ids = table.page_ids(slot, page, torch.tensor(stream, device=device))
    flat = ids[:, None] * size + torch.arange(size, device=device)
    flat[-1, (length - 1) % size + 1 :] = -1
    return flat


@dataclass(frozen=True)
class HeldPages:
    """The pages of R requests in S streams, oldest first, as many (W) as the one with most has.

    Attributes:
        ids: [R, S, W]; a request with fewer has page 0, which is padding, behind its newest one.
        written: [R, S, W, N] whether a token of the request has been written to a place.
        first: [R, S] the oldest page that is held.
    """

    ids: torch.Tensor
    written: torch.Tensor
    first: torch.Tensor

    @classmethod
    def of(
        cls, table: PageTable, size: int, slots: torch.Tensor, lengths: torch.Tensor, streams: torch.Tensor
    ) -> HeldPages:
        """Look them up, for slots [R] and tokens of the requests [R], int64, and streams [S]."""
        slots, lengths = slots[:, None], lengths[:, None]
        newest = (lengths - 1) // size
        first = torch.minimum(table.first_live[slots, streams].long(), newest)
        steps = torch.arange(int((newest - first).max()) + 1, device=first.device)
        page = first[..., None] + steps
        ids = table.page_ids(slots[..., None], torch.minimum(page, newest[..., None]), streams[:, None])
        ids = ids.masked_fill_(page > newest[..., None], 0)
        left = lengths[..., None] - page * size
        return cls(ids, torch.arange(size, device=first.device) < left[..., None], first)


def lower_ends(pages: SubsetPages, table: PageTable, batch: Batch, row: int, ends: torch.Tensor) -> None:
    """Lower ``ends`` [S, T] int32 on the CPU, by stream and position, to the ends that a row's pages hold."""
    length, size = int(batch.seq_lens[row]), pages.page_size
    for stream, mine in enumerate(ends):
        at = places(pages, table, batch.slots[row], length, stream).flatten()
        at = at[at >= 0]
        page, offset = at // size, at % size
        position = pages.begin[page, offset].long().cpu()
        mine[position] = mine[position].minimum(pages.end[page, offset].cpu())
