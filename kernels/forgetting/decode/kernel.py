"""Decode over live pages in Triton: equal shares of all pages for all programs, which join what was cut.

A program's share may begin and end in the middle of an item, a (row, head). It sums a stretch of an item with
decay counted from the stretch's own newest key, and hands in by how much the whole stretch decays; joining
adds up the decay of the newer stretches. So no program needs to know what lies outside its share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import LOG2E, beside_float8, page_id, peak_below, take_turn
from ...float8 import FP8
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ...shares.plan import DecodePlan, Launch, item_at, keys_a_block
from ...shares.reduction import hand_in, stretches_at_once
from ..pages import ForgettingPages


def launch(head_dim: int, groups: int, page_size: int, dtype: torch.dtype) -> Launch:
    """The launch for a shape and the dtype of K and V in pages. With float8 pages it is that of 16-bit models."""
    block, scaled = keys_a_block(head_dim, page_size), dtype == FP8
    if dtype == torch.float32 or head_dim > 128:
        return Launch(block, 2, 4, 4)
    if groups > 1 or head_dim > 64:
        return Launch(block, 1, 4 if scaled else 2, 8)
    return Launch(block, 1, 2, 12) if scaled or head_dim <= 32 else Launch(block, 1, 3, 8)


@triton.jit(
    do_not_specialize=["query_start", "seq_lens", "slots", "item_start", "program_item", "slot_stride", "layer",
                       "max_chunks", "streams", "items", "scale"],
)  # fmt: skip
def _decode(
    k_pages, v_pages, gate_pages, scale_pages, chunk_of, entries, q, out, arrived, partials,
    query_start, seq_lens, slots, item_start, program_item,
    slot_stride, layer, max_chunks, streams, items, scale, q_stride,
    PAGE_BYTES: tl.constexpr, KV_BYTES: tl.constexpr, P: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, JOINED: tl.constexpr, AT_ONCE: tl.constexpr,
    EARLY: tl.constexpr,
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
    GATES: tl.constexpr = 1 if G == 1 else GROUP
    g, n, dim = tl.arange(0, GROUP), tl.arange(0, BLOCK_N), tl.arange(0, D)
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
            count = (stop - at) * SUB
            query = tl.load(
                q + token * q_stride + (head * G + g)[:, None] * D + dim[None, :], mask=(g < G)[:, None], other=0.0
            )
            factor = scale * LOG2E
            if SCALED:
                query, factor = beside_float8(query, factor)
            peak = tl.full([GROUP], float("-inf"), tl.float32)
            mass = tl.zeros([GROUP], tl.float32)
            value = tl.zeros([GROUP, D], tl.float32)
            decay = tl.zeros([GATES], tl.float32)  # over the stretch's newer pages
            in_page = tl.zeros([GATES], tl.float32)  # the running sum at the page's last token
            for step in tl.range(0, count, num_stages=STAGES):
                page, sub = newest - step // SUB, SUB - 1 - step % SUB
                this = page_id(chunk_of, entries, slot, stream, page, max_chunks, streams, CHUNK)
                tokens = sub * BLOCK_N + n
                valid = page * P + tokens < length
                k = tl.load(
                    k_pages + this * (PAGE_BYTES // KV_BYTES) + tokens[:, None] * D + dim[None, :],
                    mask=valid[:, None], other=0.0,
                )  # fmt: skip
                v = tl.load(
                    v_pages + this * (PAGE_BYTES // KV_BYTES) + tokens[:, None] * D + dim[None, :],
                    mask=valid[:, None], other=0.0,
                )  # fmt: skip
                sums = gate_pages + this * (PAGE_BYTES // 4)
                if G == 1:
                    gates = tl.load(sums + tokens, mask=valid, other=0.0)[None, :]
                else:
                    gates = tl.load(
                        sums + g[:, None] * P + tokens[None, :], mask=(g < G)[:, None] & valid[None, :], other=0.0
                    )
                # Running sums fall, so the smallest is the one at the last token.
                if SUB == 1:
                    in_page = tl.min(gates, 1)
                else:
                    in_page = tl.minimum(tl.where(sub == SUB - 1, 0.0, in_page), tl.min(gates, 1))
                bias = (decay + in_page)[:, None] - gates
                k_factor = factor
                if SCALED:
                    k_factor = factor * tl.load(scale_pages + this * (PAGE_BYTES // 4))
                    k, v = k.to(query.dtype), v.to(query.dtype)
                logits = tl.dot(query, tl.trans(k), input_precision=PRECISION) * k_factor + bias * LOG2E
                logits = tl.where(valid[None, :], logits, float("-inf"))
                new_peak = tl.maximum(peak, peak_below(tl.max(logits, 1), query.dtype))
                # A block in which nothing is written yet leaves the peak at -inf.
                anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                weights = tl.exp2(logits - anchor[:, None])
                shrink = tl.exp2(peak - anchor)
                mass = mass * shrink + tl.sum(weights, 1)
                value = value * shrink[:, None]
                if SCALED:
                    # The product is scaled and not the weights: small ones times a small scale would underflow.
                    v_scale = tl.load(scale_pages + this * (PAGE_BYTES // 4) + 1)
                    value += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * v_scale
                else:
                    value = tl.dot(weights.to(v.dtype), v, value, input_precision=PRECISION)
                peak = new_peak
                decay += tl.where(sub == 0, in_page, 0.0)
            begins, ends = at == first, stop == behind
            if begins & ends:
                result = value / mass[:, None]
                tl.store(
                    out + token * (H * G * D) + (head * G + g)[:, None] * D + dim[None, :],
                    result.to(out.dtype.element_ty), mask=(g < G)[:, None],
                )  # fmt: skip
            else:
                hand_in(
                    value, peak, mass, tl.broadcast_to(decay * LOG2E, [GROUP]), out, partials, arrived,
                    program, share, first, behind, begins, token, head, D, D, H, G, GROUP, JOINED, AT_ONCE,
                )  # fmt: skip
            at = stop
        item += 1
        first, behind, slot, length, token = behind, next_behind, next_slot, next_length, next_token


_launch = Launcher(_decode, early=True)


def decode_attention(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodePlan | None,
) -> None:
    """See :func:`.reference.decode_attention`; ``workspace`` has been updated for the batch. ``out`` is contiguous,
    ``q`` dense within a token."""
    plan = workspace
    assert plan is not None
    _, heads, groups, dim = q.shape
    size, items = pages.page_size, batch.num_rows * heads
    item_start = plan.item_start[layer]
    _launch(
        (plan.programs, 1, 1),
        (
            pages.k, pages.v, pages.gates, pages.gates if pages.scales is None else pages.scales, table.chunk_of,
            table.entries, q, out, plan.arrived, plan.partials,
        ),
        (
            batch.query_start, batch.seq_lens, batch.slots, item_start, plan.program_item[layer],
            batch.slots.stride(0), layer, table.chunk_of.shape[1], table.entries.shape[1], items, scale,
        ),
        (q.stride(0),),
        (
            pages.gates.stride(0) * 4, pages.k.element_size(), size, dim, heads, groups, TABLE_CHUNK,
            plan.launch.block, max(16, triton.next_power_of_2(groups)), pages.k.dtype == FP8,
            "ieee" if q.dtype == torch.float32 else "tf32", plan.launch.stages,
            triton.next_power_of_2(groups), stretches_at_once(dim, groups, plan.launch.warps),
        ),
        num_warps=plan.launch.warps, maxnreg=plan.launch.registers,
    )  # fmt: skip
