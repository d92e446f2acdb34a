"""What prefill's tiles need to know before they start, and in which order they start.

A tile is one query block of one row and query head. One program a (row, query head) walks its live pages once and
writes their ids and the decay up to each of them as flat arrays, then finds where each of its tiles' live range
begins (it only moves forward, so by bisection). Tiles differ in length by 100x; started from the longest to the
shortest, the short ones fill the processors' gaps at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import masked_page_id, take_turn
from ...launch import Launcher
from ...leaf import num_processors
from ...paged import QUERY_BLOCK, TABLE_CHUNK, Batch, PageTable, PrefillWork
from ..pages import ForgettingPages

PAGES_PER_BLOCK = 128
"""A program looks at so many pages together."""

LENGTH_CLASSES = 64
"""Tiles are sorted by so many classes of length."""

TILES_PER_BLOCK = 512
"""Each program of the sort moves so many tiles."""


@triton.jit
def _store_split(where, x, mask):
    """A float64 as two float32: the kernels that read it subtract first the large parts, then the small ones."""
    high = x.to(tl.float32)
    tl.store(where, high, mask=mask)
    tl.store(where + 1, (x - high.to(tl.float64)).to(tl.float32), mask=mask)


@triton.jit
def _load_split(where, mask):
    high = tl.load(where, mask=mask, other=0.0).to(tl.float64)
    return high + tl.load(where + 1, mask=mask, other=0.0).to(tl.float64)


@triton.jit(
    do_not_specialize=["query_start", "seq_lens", "slots", "rows", "first_tile", "slot_stride", "layer",
                       "max_chunks", "streams", "max_pages", "threshold", "length_class", "rank", "histogram"],
)  # fmt: skip
def _plan(
    gate_pages, chunk_of, entries, first_live, ids, before, tile_first, tile_decay,
    query_start, seq_lens, slots, rows, first_tile, threshold, length_class, rank, histogram,
    slot_stride, layer, max_chunks, streams, max_pages,
    PAGE_BYTES: tl.constexpr, P: tl.constexpr, H: tl.constexpr, G: tl.constexpr, CHUNK: tl.constexpr,
    W: tl.constexpr, BLOCK_M: tl.constexpr, CLASSES: tl.constexpr, SORTED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    index, query_head = tl.program_id(0), tl.program_id(1)
    head, g = query_head // G, query_head % G
    row = tl.load(rows + index)
    slot = tl.load(slots + row * slot_stride)
    length = tl.load(seq_lens + row)
    num_q = tl.load(query_start + row + 1) - tl.load(query_start + row)
    first_pos = length - num_q
    stream = layer * H + head
    num_pages = (length - 1) // P + 1
    first = tl.minimum(tl.load(first_live + slot.to(tl.int64) * streams + stream), num_pages - 1)
    ids += (index * H + head).to(tl.int64) * max_pages
    before += (index * H * G + query_head).to(tl.int64) * max_pages * 2

    # before[p]: sum of log f over the live pages older than p, in double precision.
    total = tl.zeros([1], tl.float64)
    for start in range(first, num_pages, W):
        page = start + tl.arange(0, W)
        valid = page < num_pages
        this = masked_page_id(chunk_of, entries, slot, stream, page, valid, max_chunks, streams, CHUNK)
        if g == 0:
            tl.store(ids + page, this.to(tl.int32), mask=valid)
        # The last page may be partly written; what it adds is not needed.
        whole = page < num_pages - 1
        added = tl.load(gate_pages + this * (PAGE_BYTES // 4) + g * P + P - 1, mask=whole, other=0.0).to(tl.float64)
        _store_split(before + 2 * page, total + tl.cumsum(added, 0) - added, valid)
        total += tl.sum(added, 0)
    tl.debug_barrier()  # the search below reads what other threads have written

    limit = tl.load(threshold + query_head).to(tl.float64)
    tile0 = tl.load(first_tile + index)
    tiles = tl.load(first_tile + index + 1) - tile0
    for start in range(0, tiles, W):
        tile = start + tl.arange(0, W)
        valid = tile < tiles
        pos = first_pos + tile * BLOCK_M
        page = pos // P
        this = masked_page_id(chunk_of, entries, slot, stream, page, valid, max_chunks, streams, CHUNK)
        # c at the tile's first query, the least decayed.
        c = _load_split(before + 2 * page, valid)
        c += tl.load(gate_pages + this * (PAGE_BYTES // 4) + g * P + pos % P, mask=valid, other=0.0).to(tl.float64)
        # Page p is dead if D from the query to its last key, c - before[p + 1], is under the limit. Dead pages come
        # first: bisect for the number of them among [first, page).
        low = tl.zeros([W], tl.int32) + first
        high = tl.maximum(page, first)
        width = num_pages
        while width > 0:
            middle = (low + high) // 2
            inside = valid & (low < high)
            dead = inside & (c - _load_split(before + 2 * middle + 2, inside) < limit)
            low = tl.where(dead, middle + 1, low)
            high = tl.where(inside & (dead == 0), middle, high)
            width = width // 2
        where = (tile0 + tile).to(tl.int64) * (H * G) + query_head
        tl.store(tile_first + where, low, mask=valid)
        _store_split(tile_decay + 2 * where, c, valid)
        if SORTED:
            last = tl.minimum(pos + BLOCK_M, length) - 1
            count = last // P + 1 - low
            kind = CLASSES - 1 - tl.minimum(count * CLASSES // (max_pages + 1), CLASSES - 1)
            tl.store(length_class + where, kind, mask=valid)
            tl.store(rank + where, tl.atomic_add(histogram + kind, 1, mask=valid), mask=valid)


@triton.jit(do_not_specialize=["length_class", "rank", "order", "tiles"])
def _sort(
    histogram, length_class, rank, order, tiles,
    CLASSES: tl.constexpr, TILES_PER_BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    tile = tl.program_id(0) * TILES_PER_BLOCK + tl.arange(0, TILES_PER_BLOCK)
    valid = tile < tiles
    kind = tl.load(length_class + tile, mask=valid, other=0)
    place = tl.load(rank + tile, mask=valid, other=0)
    classes = tl.arange(0, CLASSES)
    sizes = tl.load(histogram + classes)
    place += tl.sum(tl.where(classes[None, :] < kind[:, None], sizes[None, :], 0), 1)
    tl.store(order + place, tile, mask=valid)


_launch_plan, _launch_sort = Launcher(_plan, early=True), Launcher(_sort, early=True)


class PrefillPlan:
    """One layer's plan after another, for one step: m rows with several queries, t query blocks in all, H KV heads
    of G query heads, W pages at most.

    Args:
        work: the step's.
        heads, groups: H, G.
        sort: None sorts when there are so many tiles that not all run at once.

    Attributes:
        ids: [m, H, W] int32 page ids of the live pages.
        before: [m, H * G, W, 2] float32: sum of log f over the live pages older than each page, as a float64
            split in two.
        tile_first: [t, H * G] int32: first live page of each tile.
        tile_decay: [t, H * G, 2] float32: the same sum up to the tile's first query, its own gate included.
        order: [t * H * G] int32: tiles from the longest to the shortest; None without a sort.
        histogram: [LENGTH_CLASSES] int32: tiles of each class of length. Who has used ``order`` sets it to zero for
            the next layer.
    """

    def __init__(self, work: PrefillWork, heads: int, groups: int, sort: bool | None = None) -> None:
        device, query_heads = work.tiles.device, heads * groups
        rows, blocks = len(work.rows), len(work.tiles)
        tiles = blocks * query_heads
        if sort is None:
            sort = tiles > 2 * num_processors(device)

        def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.grid = (rows, query_heads, 1)
        self.ids = scratch(rows, heads, work.max_pages)
        self.before = scratch(rows, query_heads, work.max_pages, 2, dtype=torch.float32)
        self.tile_first = scratch(blocks, query_heads)
        self.tile_decay = scratch(blocks, query_heads, 2, dtype=torch.float32)
        self.order = scratch(tiles) if sort else None
        # For each tile, its class of length, and how many of the class came before it.
        self._class = scratch(tiles) if sort else self.tile_first
        self._rank = scratch(tiles) if sort else self.tile_first
        self.histogram = scratch(LENGTH_CLASSES).zero_() if sort else self.tile_first

    def update(
        self, pages: ForgettingPages, table: PageTable, batch: Batch, layer: int, threshold: torch.Tensor
    ) -> None:
        """Plan a layer, whose new tokens are in their pages."""
        work, (heads, groups), order = batch.work, threshold.shape, self.order
        assert work is not None
        _launch_plan(
            self.grid,
            (
                pages.gates, table.chunk_of, table.entries, table.first_live, self.ids, self.before,
                self.tile_first, self.tile_decay,
            ),
            (
                batch.query_start, batch.seq_lens, batch.slots, work.rows, work.first_tile, threshold,
                self._class, self._rank, self.histogram, batch.slots.stride(0), layer, table.chunk_of.shape[1],
                table.entries.shape[1], work.max_pages,
            ),
            (),
            (
                pages.gates.stride(0) * 4, pages.page_size, heads, groups, TABLE_CHUNK, PAGES_PER_BLOCK,
                QUERY_BLOCK, LENGTH_CLASSES, order is not None,
            ),
            num_warps=4,
        )  # fmt: skip
        if order is not None:
            tiles = len(order)
            _launch_sort(
                (triton.cdiv(tiles, TILES_PER_BLOCK), 1, 1),
                (self.histogram,),
                (self._class, self._rank, order, tiles),
                (),
                (LENGTH_CLASSES, TILES_PER_BLOCK),
                num_warps=4,
            )
