"""Pages of a stream of which a subset of tokens is live, as in Dynamic Context Pruning (DCP).

Such a page keeps, for every token, its position and the position of the first query that does not see it any more.
Tokens stand where they were written, position by position, until :mod:`.compaction` moves old ones into the places
of dropped ones.

A layer has S streams, and its layer's index i on the worker gives them the numbers ``[i * S, (i + 1) * S)``. A
stream is H KV heads that share what they drop, each with G query heads: all heads of a layer (S = 1), one KV head
with its group (H = 1), or anything between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..paged import QUERY_BLOCK, Batch, PageTable

NEVER = 2**31 - 1
"""This is the end of a token that nothing has been decided about: no query drops it yet."""


@dataclass(frozen=True)
class SubsetPageFormat:
    """Bytes of one page: ``[K | V | interaction keys | begin | end]``, padded to 128 bytes.

    Args:
        page_size: tokens per page.
        heads: H, KV heads of a stream.
        head_dim: d.
        int_dim: r, size of an interaction key; 0 where streams have none.
        dtype: the model's.
    """

    page_size: int
    heads: int
    head_dim: int
    int_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        values = 2 * self.heads * self.head_dim + self.int_dim
        size = self.page_size * (values * self.dtype.itemsize + 8)
        return -(-size // 128) * 128

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
            k=part(self.dtype, self.heads, self.head_dim),
            v=part(self.dtype, self.heads, self.head_dim),
            int_k=part(self.dtype, self.int_dim),
            begin=part(torch.int32),
            end=part(torch.int32),
        )


@dataclass(frozen=True, eq=False)
class SubsetPages:
    """The page pool as typed views: P pages of N tokens, H KV heads of size d a stream, interaction keys of size r.

    A token is visible to the queries at positions ``begin`` to ``end - 1``. Once the next query stands at ``end``
    or behind it, the token is dropped: nothing reads it again, and its place is free. Places of the newest page
    hold anything until a token has been written to them; in all other pages every place has been written.

    Attributes:
        k, v: [P, N, H, d].
        int_k: [P, N, r].
        begin: [P, N] int32, the token's position.
        end: [P, N] int32, position of the first query that does not see it; :data:`NEVER` while none is known.
    """

    k: torch.Tensor
    v: torch.Tensor
    int_k: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    @property
    def page_size(self) -> int:
        return self.k.shape[1]

    @property
    def device(self) -> torch.device:
        return self.k.device


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


def rows_of(batch: Batch) -> Iterator[tuple[int, slice, int]]:
    """Rows with queries: (row, its tokens, tokens of the request after the step)."""
    start = 0
    lengths = batch.seq_lens.tolist()
    for row, (count, length) in enumerate(zip(batch.query_lens_host, lengths, strict=True)):
        if count:
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
