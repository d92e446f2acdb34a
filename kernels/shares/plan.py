"""How the live pages of a step's decode rows are shared out, once a step for all layers.

Every (row, head) with one query is an *item* whose pages are numbered from the newest to the oldest. All items'
pages stand in one line, and each of a fixed number of programs takes an equal stretch of it, wherever items begin
and end. So programs are equally busy however much live lengths differ, and the grid is the same for any batch,
which a CUDA graph needs.

A program's share may begin and end in the middle of an item. It then hands in what it has summed up, and the last
of the programs that do joins it (:mod:`.reduction`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import Launcher
from ..leaf import num_processors
from ..paged import Batch, PageTable

ITEMS_PER_BLOCK = 1024
"""The planning kernel counts so many items together."""


REGISTERS = 65536
"""Of a processor. The compiler gives a thread up to 255 of them, by eights."""


class Launch(NamedTuple):
    """How the decode kernel is compiled: keys a block, warps, pipeline stages; and programs on each processor, as
    many as its registers and shared memory hold at once."""

    block: int
    warps: int
    stages: int
    programs: int

    @property
    def registers(self) -> int | None:
        """Most registers of a thread with which the programs fit on a processor; None if any number does."""
        most = REGISTERS // (32 * self.warps * self.programs)
        return None if most > 255 else most // 8 * 8


def keys_a_block(head_dim: int, page_size: int) -> int:
    """Keys that a decode kernel computes together: 4,096 numbers of K, but no more than a page."""
    return min(page_size, max(16, 4096 // int(triton.next_power_of_2(head_dim))))


@triton.jit
def item_at(item_start, query_start, seq_lens, slots, slot_stride, item, items, H: tl.constexpr):
    """An item's end in the line of all pages; the slot and the length of its row, and the row of its query."""
    there = item < items
    row = item // H
    behind = tl.load(item_start + item + 1, mask=there, other=0)
    slot = tl.load(slots + row * slot_stride, mask=there, other=0)
    length = tl.load(seq_lens + row, mask=there, other=1)
    token = tl.load(query_start + row, mask=there, other=0).to(tl.int64)
    return behind, slot, length, token


@triton.jit(
    do_not_specialize=["query_start", "seq_lens", "slots", "slot_stride", "rows", "streams", "items_stride"],
)
def _plan(
    first_live, item_start, program_item, query_start, seq_lens, slots,
    slot_stride, rows, streams, items_stride,
    P: tl.constexpr, H: tl.constexpr, PROGRAMS: tl.constexpr, LANES: tl.constexpr, ITEMS_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(0)
    items = rows * H
    starts = item_start + layer.to(tl.int64) * items_stride
    total = 0
    for at in range(0, items, ITEMS_PER_BLOCK):
        item = at + tl.arange(0, ITEMS_PER_BLOCK)
        valid = item < items
        row = item // H
        slot = tl.load(slots + row * slot_stride, mask=valid, other=0)
        queries = tl.load(query_start + row + 1, mask=valid, other=0) - tl.load(
            query_start + row, mask=valid, other=0
        )
        newest = (tl.load(seq_lens + row, mask=valid, other=1) - 1) // P
        stream = layer * H + item % H
        first = tl.load(first_live + slot.to(tl.int64) * streams + stream, mask=valid, other=0)
        count = tl.where(valid & (slot != 0) & (queries == 1), newest + 1 - tl.minimum(first, newest), 0)
        tl.store(starts + item, total + tl.cumsum(count, 0) - count, mask=valid)
        total += tl.sum(count, 0)
    tl.store(starts + items, total)
    tl.debug_barrier()  # the search below reads what other threads have written

    # The item in which each program begins: the last one that starts at or before its first page.
    program = tl.arange(0, LANES)
    target = program * tl.cdiv(total, PROGRAMS)
    low = tl.zeros([LANES], tl.int32)
    high = tl.zeros([LANES], tl.int32) + items
    width = items
    while width > 1:
        middle = (low + high) // 2
        left = tl.load(starts + middle) <= target
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
        width = (width + 1) // 2
    tl.store(program_item + layer * PROGRAMS + program, low, mask=program < PROGRAMS)


_launch = Launcher(_plan)


class DecodePlan:
    """The shares of one worker's layers, in buffers that stay where they are (CUDA graphs remember them).

    Args:
        launch: of the decode kernel.
        layers, heads, groups, head_dim: of the worker: KV heads a layer, each a stream; query heads a KV head; d.
        page_size: tokens a page.
        max_rows: most rows that a step can have.
        device: of the page pool.

    Attributes:
        item_start: [layers, max_rows * heads + 1] int32: number of the first page of each item in the line, for
            the step's rows; then the number of all pages.
        program_item: [layers, programs] int32: item in which each program's share begins.
        arrived: [programs] int32, of one layer at a time: how many programs have handed in what they summed up of
            the item that begins in this program's share and goes on in the next one's. It is 0 between layers.
        partials: [programs, 2, groups, head_dim + 3] float32, of one layer at a time: what a program has summed up
            of the items that are cut off at its share's ends. The one that goes on in the next program is at 1, the
            one that came from the program before at 0. The numbers are the weighted sum of the values, the logit
            at which weights are 1, the sum of the weights, and the decay over the stretch. Logits and decay are to
            base 2.
    """

    def __init__(
        self,
        launch: Launch,
        *,
        layers: int,
        heads: int,
        groups: int,
        head_dim: int,
        page_size: int,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self.launch, self.layers, self.heads, self.page_size = launch, layers, heads, page_size
        self.programs = num_processors(device) * launch.programs

        def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.item_start = scratch(layers, max_rows * heads + 1)
        self.program_item = scratch(layers, self.programs)
        self.arrived = scratch(self.programs)
        self.partials = scratch(self.programs, 2, groups, head_dim + 3, dtype=torch.float32)

    def update(self, table: PageTable, batch: Batch) -> None:
        """Share out the live pages of the batch's rows with one query."""
        lanes = triton.next_power_of_2(self.programs)
        _launch(
            (self.layers, 1, 1),
            (table.first_live, self.item_start, self.program_item),
            (
                batch.query_start, batch.seq_lens, batch.slots, batch.slots.stride(0), batch.num_rows,
                table.first_live.shape[1], self.item_start.stride(0),
            ),
            (),
            (self.page_size, self.heads, self.programs, lanes, ITEMS_PER_BLOCK),
            num_warps=8,
        )  # fmt: skip
