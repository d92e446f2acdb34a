"""Decode over pages of single KV heads in Triton: equal shares for all programs, which join what was cut.

Compaction keeps nearly all places of nearly all pages full, so there is little to leave out. K is therefore read of
all tokens of a page, at the same time as the ends that say which of them are seen. V is read when the ends are
known, of the seen tokens alone: another place may hold NaN, which times a weight of zero is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import LOG2E, beside_float8, page_id, peak_below, power_of_two_above, take_turn
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ...shares.plan import DecodePlan, Launch, item_at, keys_a_block
from ...shares.reduction import hand_in, stretches_at_once
from ..pages import SubsetPages


def launch(head_dim: int, page_size: int, dtype: torch.dtype) -> Launch:
    """The launch for a shape and the dtype of K and V in pages. With float8 pages it is that of 16-bit models."""
    block = keys_a_block(head_dim, page_size)
    if head_dim > 128:
        return Launch(block, 2, 3, 4)
    if dtype == torch.float32:
        return Launch(block, 2, 4, 4)
    return Launch(block, 1, 4, 8)


@triton.jit(
    do_not_specialize=["query_start", "seq_lens", "slots", "item_start", "program_item", "slot_stride", "layer",
                       "max_chunks", "streams", "items", "scale"],
)  # fmt: skip
def _decode(
    k_pages, v_pages, end_pages, scale_pages, chunk_of, entries, q, out, arrived, partials,
    query_start, seq_lens, slots, item_start, program_item,
    slot_stride, layer, max_chunks, streams, items, scale, q_stride,
    PAGE: tl.constexpr, PAGE_INTS: tl.constexpr, PAGE_SCALES: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    JOINED: tl.constexpr, AT_ONCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.load(item_start + items)
    share = tl.cdiv(total, programs)
    at = program * share
    end = tl.minimum(at + share, total)
    item = tl.load(program_item + program)
    first = tl.load(item_start + item)
    behind, slot, length, token = item_at(item_start, query_start, seq_lens, slots, slot_stride, item, items, H)
    SUB: tl.constexpr = P // BLOCK_N
    g, n, dim = tl.arange(0, GROUP), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    asked = (g < G)[:, None] & (dim < D)[None, :]
    while at < end:
        # The next stretch's row is looked up before this one is computed, so that nothing waits for it later.
        next_behind, next_slot, next_length, next_token = item_at(
            item_start, query_start, seq_lens, slots, slot_stride, item + 1, items, H
        )
        stop = tl.minimum(behind, end)
        if stop > at:
            head = item % H
            stream = layer * H + head
            newest = (length - 1) // P - (at - first)  # of this stretch
            heads = (head * G + g)[:, None] * D + dim[None, :]
            query = tl.load(q + token * q_stride + heads, mask=asked, other=0.0)
            factor = scale * LOG2E
            if SCALED:
                query, factor = beside_float8(query, factor)
            peak = tl.full([GROUP], float("-inf"), tl.float32)
            mass = tl.zeros([GROUP], tl.float32)
            value = tl.zeros([GROUP, BLOCK_D], tl.float32)
            # The newest page holds the query's own token, so an item's first stretch sees something.
            for step in tl.range(0, (stop - at) * SUB, num_stages=STAGES):
                page, offset = newest - step // SUB, step % SUB * BLOCK_N + n
                this = page_id(chunk_of, entries, slot, stream, page, max_chunks, streams, CHUNK)
                written = page * P + offset < length
                seen = tl.load(end_pages + this * PAGE_INTS + offset, mask=written, other=0) >= length
                here, inside = this * PAGE + offset[:, None] * D + dim[None, :], (dim < D)[None, :]
                k = tl.load(k_pages + here, mask=written[:, None] & inside, other=0.0)
                v = tl.load(v_pages + here, mask=seen[:, None] & inside, other=0.0)
                if SCALED:
                    scales = scale_pages + this * PAGE_SCALES + 2 * offset
                    k_scale = tl.load(scales, mask=written, other=0.0).to(tl.float32)
                    v_scale = tl.load(scales + 1, mask=seen, other=0.0).to(tl.float32)
                    k, v = k.to(query.dtype), v.to(query.dtype)
                logits = tl.dot(query, tl.trans(k), input_precision=PRECISION) * factor
                if SCALED:
                    logits = logits * k_scale[None, :]
                logits = tl.where(seen[None, :], logits, float("-inf"))
                new_peak = tl.maximum(peak, peak_below(tl.max(logits, 1), query.dtype))
                # A block of which nothing is seen leaves the peak at -inf.
                anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weights = tl.exp2(logits - anchor[:, None])
                shrink = tl.exp2(peak - anchor)
                mass = mass * shrink + tl.sum(weights, 1)
                value = value * shrink[:, None]
                if SCALED:
                    # Relative to the block's largest scale: a small weight times a small scale would underflow.
                    largest = power_of_two_above(tl.max(v_scale))
                    weights *= (v_scale / largest)[None, :]
                    value += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * largest
                else:
                    value = tl.dot(weights.to(v.dtype), v, value, input_precision=PRECISION)
                peak = new_peak
            begins, ends = at == first, stop == behind
            if begins & ends:
                result = (value / mass[:, None]).to(out.dtype.element_ty)
                tl.store(out + token * (H * G * D) + heads, result, mask=asked)
            else:
                hand_in(
                    value, peak, mass, tl.zeros([GROUP], tl.float32), out, partials, arrived,
                    program, share, first, behind, begins, token, head, D, BLOCK_D, H, G, GROUP, JOINED, AT_ONCE,
                )  # fmt: skip
            at = stop
        item += 1
        first, behind, slot, length, token = behind, next_behind, next_slot, next_length, next_token


_launch = Launcher(_decode, early=True)


def decode_over_pages(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    plan: DecodePlan,
) -> None:
    """:func:`.reference.subset_attention` of rows with one query, over streams of one KV head.

    Args:
        plan: updated for the batch.
    """
    _, heads, _, groups, dim = q.shape
    scales = pages.end if pages.scales is None else pages.scales  # not read without scales
    _launch(
        (plan.programs, 1, 1),
        (
            pages.k, pages.v, pages.end, scales, table.chunk_of, table.entries, q, out, plan.arrived,
            plan.partials,
        ),
        (
            batch.query_start, batch.seq_lens, batch.slots, plan.item_start[layer], plan.program_item[layer],
            batch.slots.stride(0), layer, table.chunk_of.shape[1], table.entries.shape[1], batch.num_rows * heads,
            scale,
        ),
        (q.stride(0),),
        (
            pages.k.stride(0), pages.end.stride(0), scales.stride(0), pages.page_size, dim,
            triton.next_power_of_2(dim), heads, groups, TABLE_CHUNK, plan.launch.block,
            max(16, triton.next_power_of_2(groups)), pages.scales is not None,
            "ieee" if q.dtype == torch.float32 else "tf32", plan.launch.stages,
            triton.next_power_of_2(groups), stretches_at_once(dim, groups, plan.launch.warps),
        ),
        num_warps=plan.launch.warps, maxnreg=plan.launch.registers,
    )  # fmt: skip
