"""The page write as one Triton kernel: a program for every (page touched by the step, KV head)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...common import page_id, power_of_two_above, take_turn
from ...float8 import FP8, FP8_MAX
from ...launch import Launcher
from ...paged import TABLE_CHUNK, Batch, PageTable
from ..pages import GATE_FLOOR, ForgettingPages

BLOCK_ELEMENTS = 4096
"""A program handles at most so many elements of K, and of V, at once."""


@triton.jit
def _log_sigmoid(x):
    small = tl.exp(-tl.abs(x))
    # log(1 + s) loses s itself where s is small.
    series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0)))
    return tl.minimum(x, 0.0) - tl.where(small < 0.01, series, tl.log(1.0 + small))


@triton.jit
def _shift_logits(shift, token, mask, stride, head, SHIFT: tl.constexpr):
    if SHIFT:
        logits = tl.load(shift + token.to(tl.int64) * stride + head, mask=mask, other=0.0).to(tl.float32)
    else:
        logits = tl.zeros(token.shape, tl.float32)
    return logits


@triton.jit
def _mixed(current, stored, shift, token, offset, pos, first_pos, mask, stride, stored_offset, SHIFT: tl.constexpr):
    """Values [N, D'] after token shift; ``token`` [N] and ``pos`` [N] are the tokens' rows and positions."""
    where = token.to(tl.int64)[:, None] * stride + offset[None, :]
    x = tl.load(current + where, mask=mask[:, None], other=0.0)
    if SHIFT:
        within = mask & (pos > first_pos)
        previous = tl.load(current + where - stride, mask=within[:, None], other=0.0).to(tl.float32)
        # The row's first token follows one of an earlier step, whose raw values its page kept.
        before = mask & (pos == first_pos) & (pos > 0)
        kept = tl.load(stored + stored_offset[None, :] + token[:, None] * 0, mask=before[:, None], other=0.0)
        previous = tl.where(before[:, None], kept.to(tl.float32), previous)
        a = tl.sigmoid(shift)[:, None]
        x = (a * previous + (1.0 - a) * x.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _new_keys(
    k, k_norm, last, shift, token, pos, first_pos, mask, stride, head,
    D: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, LOG2_ROPE: tl.constexpr,
):  # fmt: skip
    """Both halves [N, D / 2] of the final keys in the model's dtype."""
    HALF: tl.constexpr = D // 2
    half = tl.arange(0, HALF)
    first = _mixed(k, last, shift, token, head * D + half, pos, first_pos, mask, stride, half, SHIFT)
    second = _mixed(k, last, shift, token, head * D + HALF + half, pos, first_pos, mask, stride, HALF + half, SHIFT)
    dtype: tl.constexpr = first.dtype
    if NORM:
        a, b = first.to(tl.float32), second.to(tl.float32)
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / D + EPS)[:, None]
        first = (a * inverse * tl.load(k_norm + head * D + half).to(tl.float32)[None, :]).to(dtype)
        second = (b * inverse * tl.load(k_norm + head * D + HALF + half).to(tl.float32)[None, :]).to(dtype)
    if LOG2_ROPE is not None:
        angle = pos.to(tl.float32)[:, None] * tl.exp2(half.to(tl.float32) * (-LOG2_ROPE / HALF))[None, :]
        cos, sin = tl.cos(angle), tl.sin(angle)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first, second = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    return first, second


@triton.jit
def _grown_scale(scales, old_exists, largest, FP8_LARGEST: tl.constexpr):
    """The page's scale before and after the step."""
    old = tl.load(scales, mask=old_exists, other=0.0)
    return old, tl.maximum(old, power_of_two_above(largest / FP8_LARGEST))


@triton.jit
def _rescale(page, old, new, count, P: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Bring the first ``count`` tokens of a float8 page from scale ``old`` to ``new``."""
    if (old > 0.0) & (new > old):
        dim = tl.arange(0, D)
        for start in range(0, P, BLOCK):
            n = start + tl.arange(0, BLOCK)
            where = page + n[:, None] * D + dim[None, :]
            content = tl.load(where, mask=(n < count)[:, None], other=0.0).to(tl.float32) * (old / new)
            tl.store(where, content.to(tl.float8e4nv), mask=(n < count)[:, None])


@triton.jit(
    do_not_specialize=["gate", "shift_k", "shift_v", "query_start", "seq_lens", "slots", "work",
                       "gate_stride", "shift_k_stride", "shift_v_stride", "slot_stride", "layer",
                       "max_chunks", "streams"],
)  # fmt: skip
def _cache_write(
    k_pages, v_pages, gate_pages, scale_pages, last_pages, chunk_of, entries, k, v, k_norm,
    query_start, seq_lens, slots, work, gate, shift_k, shift_v,
    gate_stride, shift_k_stride, shift_v_stride, slot_stride, layer, max_chunks, streams, k_stride, v_stride,
    PAGE_BYTES: tl.constexpr, P: tl.constexpr, D: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ONE_TOKEN: tl.constexpr, KV_BYTES: tl.constexpr,
    MODEL_BYTES: tl.constexpr, SHIFT_K: tl.constexpr, SHIFT_V: tl.constexpr, KEPT: tl.constexpr,
    NORM: tl.constexpr, EPS: tl.constexpr, LOG2_ROPE: tl.constexpr, FLOOR: tl.constexpr,
    SCALED: tl.constexpr, FP8_LARGEST: tl.constexpr, BLOCK_KEPT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    take_turn(EARLY)
    head = tl.program_id(0)
    if ONE_TOKEN:
        row = tl.program_id(1)
    else:
        row = tl.load(work + 2 * tl.program_id(1))
    slot = tl.load(slots + row * slot_stride)
    q0 = tl.load(query_start + row)
    num_q = tl.load(query_start + row + 1) - q0
    if (slot == 0) | (num_q == 0):
        return
    length = tl.load(seq_lens + row)
    first_pos = length - num_q
    if ONE_TOKEN:
        page = first_pos // P
    else:
        page = first_pos // P + tl.load(work + 2 * tl.program_id(1) + 1)
    if page * P >= length:
        return
    begin = tl.maximum(first_pos, page * P)
    end = tl.minimum(length, (page + 1) * P)
    stream = layer * H + head
    this = page_id(chunk_of, entries, slot, stream, page, max_chunks, streams, CHUNK)
    had = begin - page * P  # tokens that the page holds already

    # In-page running sums of log f.
    if ONE_TOKEN:
        for g in tl.static_range(G):
            sums = gate_pages + this * (PAGE_BYTES // 4) + g * P
            carry = tl.load(sums + had - 1, mask=had > 0, other=0.0)
            x = tl.load(gate + q0.to(tl.int64) * gate_stride + head * G + g).to(tl.float32)
            tl.store(sums + had, carry + tl.maximum(_log_sigmoid(x), FLOOR))
    else:
        n = tl.arange(0, P)
        new = (page * P + n >= begin) & (page * P + n < end)
        source = (q0 + page * P + n - first_pos).to(tl.int64) * gate_stride + head * G
        for g in tl.static_range(G):
            sums = gate_pages + this * (PAGE_BYTES // 4) + g * P
            carry = tl.load(sums + had - 1, mask=had > 0, other=0.0)
            x = tl.load(gate + source + g, mask=new, other=0.0).to(tl.float32)
            log_f = tl.where(new, tl.maximum(_log_sigmoid(x), FLOOR), 0.0)
            tl.store(sums + n, carry + tl.cumsum(log_f, 0), mask=new)

    last = last_pages
    if KEPT > 0:
        before = this
        if (begin == first_pos) & (first_pos > 0) & (had == 0):
            before = page_id(chunk_of, entries, slot, stream, page - 1, max_chunks, streams, CHUNK)
        kept_before = tl.maximum(first_pos - 1, 0) % P % KEPT
        last = last_pages + before * (PAGE_BYTES // MODEL_BYTES) + kept_before * 2 * D

    k_page = k_pages + this * (PAGE_BYTES // KV_BYTES)
    v_page = v_pages + this * (PAGE_BYTES // KV_BYTES)
    N: tl.constexpr = 1 if ONE_TOKEN else BLOCK
    BLOCKS: tl.constexpr = 1 if ONE_TOKEN else P // BLOCK
    base = begin if ONE_TOKEN else page * P
    HALF: tl.constexpr = D // 2
    half, dim = tl.arange(0, HALF), tl.arange(0, D)

    k_scale, v_scale = 1.0, 1.0
    if SCALED:
        largest_k, largest_v = 0.0, 0.0
        for block in range(BLOCKS):
            pos = base + block * BLOCK + tl.arange(0, N)
            mask = (pos >= begin) & (pos < end)
            token = q0 + pos - first_pos
            a_k = _shift_logits(shift_k, token, mask, shift_k_stride, head, SHIFT_K)
            a_v = _shift_logits(shift_v, token, mask, shift_v_stride, head, SHIFT_V)
            first, second = _new_keys(k, k_norm, last, a_k, token, pos, first_pos, mask, k_stride, head,
                                      D, SHIFT_K, NORM, EPS, LOG2_ROPE)  # fmt: skip
            value = _mixed(v, last + D, a_v, token, head * D + dim, pos, first_pos, mask, v_stride, dim, SHIFT_V)
            peak = tl.maximum(tl.max(tl.abs(first.to(tl.float32)), 1), tl.max(tl.abs(second.to(tl.float32)), 1))
            largest_k = tl.maximum(largest_k, tl.max(tl.where(mask, peak, 0.0), 0))
            peak = tl.max(tl.abs(value.to(tl.float32)), 1)
            largest_v = tl.maximum(largest_v, tl.max(tl.where(mask, peak, 0.0), 0))
        scales = scale_pages + this * (PAGE_BYTES // 4)
        old_k, k_scale = _grown_scale(scales, had > 0, largest_k, FP8_LARGEST)
        old_v, v_scale = _grown_scale(scales + 1, had > 0, largest_v, FP8_LARGEST)
        tl.debug_barrier()
        tl.store(scales, k_scale)
        tl.store(scales + 1, v_scale)
        _rescale(k_page, old_k, k_scale, had, P, D, BLOCK)
        _rescale(v_page, old_v, v_scale, had, P, D, BLOCK)

    for block in range(BLOCKS):
        pos = base + block * BLOCK + tl.arange(0, N)
        mask = (pos >= begin) & (pos < end)
        token = q0 + pos - first_pos
        a_k = _shift_logits(shift_k, token, mask, shift_k_stride, head, SHIFT_K)
        a_v = _shift_logits(shift_v, token, mask, shift_v_stride, head, SHIFT_V)
        first, second = _new_keys(k, k_norm, last, a_k, token, pos, first_pos, mask, k_stride, head,
                                  D, SHIFT_K, NORM, EPS, LOG2_ROPE)  # fmt: skip
        value = _mixed(v, last + D, a_v, token, head * D + dim, pos, first_pos, mask, v_stride, dim, SHIFT_V)
        at = (pos - page * P)[:, None] * D
        if SCALED:
            tl.store(k_page + at + half[None, :], (first.to(tl.float32) / k_scale).to(tl.float8e4nv), mask[:, None])
            tl.store(k_page + at + HALF + half[None, :], (second.to(tl.float32) / k_scale).to(tl.float8e4nv),
                     mask[:, None])  # fmt: skip
            tl.store(v_page + at + dim[None, :], (value.to(tl.float32) / v_scale).to(tl.float8e4nv), mask[:, None])
        else:
            tl.store(k_page + at + half[None, :], first, mask[:, None])
            tl.store(k_page + at + HALF + half[None, :], second, mask[:, None])
            tl.store(v_page + at + dim[None, :], value, mask[:, None])

    if KEPT > 0:
        NEWEST: tl.constexpr = 1 if ONE_TOKEN else BLOCK_KEPT
        pos = end - 1 - tl.arange(0, NEWEST)
        mask = (pos >= begin) & (pos >= end - KEPT)
        newest = (q0 + pos - first_pos).to(tl.int64)[:, None]
        raw_k = tl.load(k + newest * k_stride + (head * D + dim)[None, :], mask=mask[:, None], other=0.0)
        raw_v = tl.load(v + newest * v_stride + (head * D + dim)[None, :], mask=mask[:, None], other=0.0)
        # Every thread has read what the page kept before any overwrites it.
        tl.debug_barrier()
        keep = last_pages + this * (PAGE_BYTES // MODEL_BYTES) + ((pos - page * P) % KEPT * 2 * D)[:, None]
        tl.store(keep + dim[None, :], raw_k, mask=mask[:, None])
        tl.store(keep + D + dim[None, :], raw_v, mask=mask[:, None])


_launch = Launcher(_cache_write, early=True)


def cache_write(
    pages: ForgettingPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    *,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    rope_base: float | None,
) -> None:
    """See :func:`.reference.cache_write`; each tensor may have any stride over tokens, and is dense within one."""
    _, heads, dim = k.shape
    size, work, log2_rope = pages.page_size, batch.work, None if rope_base is None else math.log2(rope_base)
    block = min(size, max(1, BLOCK_ELEMENTS // dim))
    kept = 0 if pages.last is None else pages.last.shape[1]
    _launch(
        (heads, batch.num_rows if work is None else len(work.pages), 1),
        (
            pages.k, pages.v, pages.gates, pages.gates if pages.scales is None else pages.scales,
            k if pages.last is None else pages.last, table.chunk_of, table.entries, k, v,
            k if k_norm is None else k_norm,
        ),
        (
            batch.query_start, batch.seq_lens, batch.slots, batch.slots if work is None else work.pages,
            gate, gate if shift_k is None else shift_k, gate if shift_v is None else shift_v, gate.stride(0),
            0 if shift_k is None else shift_k.stride(0), 0 if shift_v is None else shift_v.stride(0),
            batch.slots.stride(0), layer, table.chunk_of.shape[1], table.entries.shape[1],
        ),
        (k.stride(0), v.stride(0)),
        (
            pages.gates.stride(0) * 4, size, dim, heads, gate.shape[2], TABLE_CHUNK, block, work is None,
            pages.k.element_size(), k.element_size(), shift_k is not None, shift_v is not None,
            kept, k_norm is not None, norm_eps, log2_rope, GATE_FLOOR, pages.k.dtype == FP8,
            FP8_MAX, triton.next_power_of_2(max(kept, 1)),
        ),
        num_warps=1 if work is None else 4,
    )  # fmt: skip
