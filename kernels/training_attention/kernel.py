"""Forgetting attention over whole sequences in Triton: a program for every tile of queries, or of keys, of a head.

Nothing is accumulated across programs: the backward pass has one kernel for the gradients of queries and one for
those of keys, values and gates, so its results do not depend on the order in which programs run.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common import LOG2E
from .plan import Decay, Tiles, key_tiles, query_tiles
from .reference import gate_gradient


class Launch(NamedTuple):
    """How a kernel is compiled: rows of its tiles, of the blocks that it visits, warps, pipeline stages."""

    tile: int
    block: int
    warps: int
    stages: int


@cache
def launches(dim: int, dtype: torch.dtype) -> tuple[Launch, Launch, Launch]:
    """Of the forward kernel and of the backward kernels for queries and for keys."""
    if dtype == torch.float32:
        return (Launch(64, 32, 4, 2),) * 3 if dim <= 128 else (Launch(32, 16, 4, 1),) * 3
    if dim <= 64:
        return Launch(128, 64, 4, 3), Launch(128, 64, 8, 3), Launch(128, 64, 8, 3)
    if dim <= 128:
        return Launch(128, 64, 8, 3), Launch(64, 64, 4, 2), Launch(64, 64, 4, 2)
    return Launch(64, 32, 4, 2), Launch(64, 32, 8, 2), Launch(64, 32, 8, 1)


@triton.jit
def _decay(high, low, rows, base, inside, MASKED: tl.constexpr):
    """(c_row - c_base) log2 e, exact for rows near the base."""
    near = _values(high, rows, inside, MASKED) - tl.load(high + base)
    return (near + (_values(low, rows, inside, MASKED) - tl.load(low + base))) * LOG2E


@triton.jit
def _values(pointer, rows, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + rows, mask=inside, other=0.0)
    else:
        return tl.load(pointer + rows)


@triton.jit
def _forward_block(
    query, peak, mass, value, k, v, high, low, start, key0, end, query_pos, factor, stride,
    BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the softmax's running maximum, sum and value after it."""
    keys = key0 + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = keys < end
    k += key0.to(tl.int64) * stride
    v += key0.to(tl.int64) * stride
    if MASKED:
        key = tl.load(k + where, mask=inside[:, None], other=0.0)
    else:
        key = tl.load(k + where)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
    logits -= _decay(high, low, keys, start, inside, MASKED)[None, :]
    if MASKED:
        logits = tl.where((query_pos[:, None] >= keys[None, :]) & inside[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    mass = mass * shrink + tl.sum(weights, 1)
    if MASKED:
        v_block = tl.load(v + where, mask=inside[:, None], other=0.0)
    else:
        v_block = tl.load(v + where)
    value = tl.dot(weights.to(v_block.dtype), v_block, value * shrink[:, None], input_precision=PRECISION)
    return new_peak, mass, value


@triton.jit(do_not_specialize=["tokens", "tiles", "scale"])
def _forward(
    q, k, v, high, low, out, lse, bounds, limit, order, tokens, tiles, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    item = tl.load(order + tl.program_id(0))
    head, tile = item // tiles, item % tiles
    start, begin, end = tl.load(bounds + 3 * tile), tl.load(bounds + 3 * tile + 1), tl.load(bounds + 3 * tile + 2)
    if start < end:
        first = tl.load(limit + item)
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
        query = tl.load(q + at, mask=inside[:, None], other=0.0)
        high += head.to(tl.int64) * tokens
        low += head.to(tl.int64) * tokens
        k += head // (H // KV) * D
        v += head // (H // KV) * D
        factor = scale * LOG2E
        # A row with -inf as its largest logit so far would make NaN of exp2(-inf - -inf).
        peak = tl.full([TILE], -1e30, tl.float32)
        mass = tl.zeros([TILE], tl.float32)
        value = tl.zeros([TILE, D], tl.float32)
        diagonal = tl.maximum((start - begin) // BLOCK, first)
        stop = tl.cdiv(tl.minimum(start + TILE, end) - begin, BLOCK)
        for n in tl.range(first, diagonal, num_stages=STAGES):
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, high, low, start, begin + n * BLOCK, end, rows, factor, KV * D,
                BLOCK, D, False, PRECISION,
            )  # fmt: skip
        for n in tl.range(diagonal, stop, num_stages=2):
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, high, low, start, begin + n * BLOCK, end, rows, factor, KV * D,
                BLOCK, D, True, PRECISION,
            )  # fmt: skip
        tl.store(out + at, (value / mass[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
        # Base 2, with the row's own decay, so that whoever reads it may count decay from where they like.
        own = _decay(high, low, rows, start, inside, True)
        tl.store(lse + head.to(tl.int64) * tokens + rows, peak + tl.log2(mass) + own, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _row_products(out, grad_out, delta, tokens, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """delta [H, N]: out . grad_out of every row."""
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inside = rows < tokens
    at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
    x = tl.load(out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(grad_out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * tokens + rows, tl.sum(x * y, 1), mask=inside)


@triton.jit
def _query_block(
    query, grad, bias, row_delta, grad_query, k, v, high, low, start, key0, end, query_pos, factor, stride,
    BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the gradient of the queries."""
    keys = key0 + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = keys < end
    k += key0.to(tl.int64) * stride
    v += key0.to(tl.int64) * stride
    if MASKED:
        key = tl.load(k + where, mask=inside[:, None], other=0.0)
        value = tl.load(v + where, mask=inside[:, None], other=0.0)
    else:
        key, value = tl.load(k + where), tl.load(v + where)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor
    logits += bias[:, None] - _decay(high, low, keys, start, inside, MASKED)[None, :]
    if MASKED:
        logits = tl.where((query_pos[:, None] >= keys[None, :]) & inside[None, :], logits, float("-inf"))
    weights = tl.exp2(logits)
    through = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    grad_logits = weights * (through - row_delta[:, None])
    return tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "tiles", "scale"])
def _backward_queries(
    q, k, v, high, low, grad_out, lse, delta, grad_q, bounds, limit, order, tokens, tiles, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    item = tl.load(order + tl.program_id(0))
    head, tile = item // tiles, item % tiles
    start, begin, end = tl.load(bounds + 3 * tile), tl.load(bounds + 3 * tile + 1), tl.load(bounds + 3 * tile + 2)
    if start < end:
        first = tl.load(limit + item)
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
        query = tl.load(q + at, mask=inside[:, None], other=0.0)
        grad = tl.load(grad_out + at, mask=inside[:, None], other=0.0)
        high += head.to(tl.int64) * tokens
        low += head.to(tl.int64) * tokens
        mine = head.to(tl.int64) * tokens + rows
        bias = _decay(high, low, rows, start, inside, True) - tl.load(lse + mine, mask=inside, other=0.0)
        row_delta = tl.load(delta + mine, mask=inside, other=0.0)
        k += head // (H // KV) * D
        v += head // (H // KV) * D
        factor = scale * LOG2E
        grad_query = tl.zeros([TILE, D], tl.float32)
        diagonal = tl.maximum((start - begin) // BLOCK, first)
        stop = tl.cdiv(tl.minimum(start + TILE, end) - begin, BLOCK)
        for n in tl.range(first, diagonal, num_stages=STAGES):
            grad_query = _query_block(
                query, grad, bias, row_delta, grad_query, k, v, high, low, start, begin + n * BLOCK, end, rows,
                factor, KV * D, BLOCK, D, False, PRECISION,
            )  # fmt: skip
        for n in tl.range(diagonal, stop, num_stages=1):
            grad_query = _query_block(
                query, grad, bias, row_delta, grad_query, k, v, high, low, start, begin + n * BLOCK, end, rows,
                factor, KV * D, BLOCK, D, True, PRECISION,
            )  # fmt: skip
        tl.store(grad_q + at, (grad_query * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _key_block(
    key, value, bias, grad_key, grad_value, column, q, grad_out, high, low, lse, delta, start, row0, end, keys,
    factor, stride, BLOCK: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: what it adds to the gradients of keys, values and gates. Rows are keys here."""
    rows = row0 + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = rows < end
    q += row0.to(tl.int64) * stride
    grad_out += row0.to(tl.int64) * stride
    if MASKED:
        query = tl.load(q + where, mask=inside[:, None], other=0.0)
        grad = tl.load(grad_out + where, mask=inside[:, None], other=0.0)
    else:
        query, grad = tl.load(q + where), tl.load(grad_out + where)
    logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * factor
    row_bias = _decay(high, low, rows, start, inside, MASKED) - _values(lse, rows, inside, MASKED)
    logits += row_bias[None, :] - bias[:, None]
    if MASKED:
        logits = tl.where((rows[None, :] >= keys[:, None]) & inside[None, :], logits, float("-inf"))
    weights = tl.exp2(logits)
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
    through = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    grad_logits = weights * (through - _values(delta, rows, inside, MASKED)[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value, column + tl.sum(grad_logits, 1)


@triton.jit(do_not_specialize=["tokens", "tiles", "scale"])
def _backward_keys(
    q, k, v, high, low, grad_out, lse, delta, grad_k, grad_v, column, bounds, limit, order, tokens, tiles, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    item = tl.load(order + tl.program_id(0))
    kv_head, tile = item // tiles, item % tiles
    start, begin, end = tl.load(bounds + 3 * tile), tl.load(bounds + 3 * tile + 1), tl.load(bounds + 3 * tile + 2)
    if start < end:
        keys = start + tl.arange(0, TILE)
        inside = keys < end
        at = keys.to(tl.int64)[:, None] * (KV * D) + kv_head * D + tl.arange(0, D)[None, :]
        key = tl.load(k + at, mask=inside[:, None], other=0.0)
        value = tl.load(v + at, mask=inside[:, None], other=0.0)
        factor = scale * LOG2E
        grad_key = tl.zeros([TILE, D], tl.float32)
        grad_value = tl.zeros([TILE, D], tl.float32)
        for group in range(H // KV):
            head = kv_head * (H // KV) + group
            line = head.to(tl.int64) * tokens
            bias = _decay(high + line, low + line, keys, start, inside, True)
            sums = tl.zeros([TILE], tl.float32)
            last = tl.load(limit + head * tiles + tile)
            # Blocks from ``clear`` on lie behind the tile's last key; the last of them may reach past the end.
            diagonal, clear = (start - begin) // BLOCK, tl.cdiv(start + TILE - begin, BLOCK)
            whole = tl.minimum(last + 1, (end - begin) // BLOCK)
            for n in tl.range(diagonal, tl.minimum(clear, last + 1), num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, bias, grad_key, grad_value, sums, q + head * D, grad_out + head * D, high + line,
                    low + line, lse + line, delta + line, start, begin + n * BLOCK, end, keys, factor, H * D,
                    BLOCK, D, True, PRECISION,
                )  # fmt: skip
            for n in tl.range(clear, whole, num_stages=STAGES):
                grad_key, grad_value, sums = _key_block(
                    key, value, bias, grad_key, grad_value, sums, q + head * D, grad_out + head * D, high + line,
                    low + line, lse + line, delta + line, start, begin + n * BLOCK, end, keys, factor, H * D,
                    BLOCK, D, False, PRECISION,
                )  # fmt: skip
            for n in tl.range(tl.maximum(clear, whole), last + 1, num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, bias, grad_key, grad_value, sums, q + head * D, grad_out + head * D, high + line,
                    low + line, lse + line, delta + line, start, begin + n * BLOCK, end, keys, factor, H * D,
                    BLOCK, D, True, PRECISION,
                )  # fmt: skip
            tl.store(column + line + keys, sums, mask=inside)
        tl.store(grad_k + at, (grad_key * scale).to(grad_k.dtype.element_ty), mask=inside[:, None])
        tl.store(grad_v + at, grad_value.to(grad_v.dtype.element_ty), mask=inside[:, None])


def _precision(q: torch.Tensor) -> str:
    return "ieee" if q.dtype == torch.float32 else "tf32"


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.forward`; tensors are contiguous. The logarithm returned is to base 2."""
    tokens, heads, dim = q.shape
    launch = launches(dim, q.dtype)[0]
    decay = Decay.of(log_forget)
    tiles = query_tiles(decay, cu_seqlens, threshold, launch.tile, launch.block)
    out, lse = torch.empty_like(q), torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    _forward[(len(tiles.order),)](
        q, k, v, decay.high, decay.low, out, lse, tiles.bounds, tiles.limit, tiles.order, tokens,
        len(tiles.bounds), scale, heads, k.shape[1], dim, launch.tile, launch.block, _precision(q), launch.stages,
        num_warps=launch.warps,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`."""
    tokens, heads, dim = q.shape
    kv_heads, precision = k.shape[1], _precision(q)
    _, for_queries, for_keys = launches(dim, q.dtype)
    grad_out, decay = grad_out.contiguous(), Decay.of(log_forget)
    delta, column = torch.empty_like(lse), torch.empty_like(lse)
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _row_products[(triton.cdiv(tokens, 32), heads)](out, grad_out, delta, tokens, heads, dim, 32)
    tiles = query_tiles(decay, cu_seqlens, threshold, for_queries.tile, for_queries.block)
    _backward_queries[(len(tiles.order),)](
        q, k, v, decay.high, decay.low, grad_out, lse, delta, grad_q, tiles.bounds, tiles.limit, tiles.order,
        tokens, len(tiles.bounds), scale, heads, kv_heads, dim, for_queries.tile, for_queries.block, precision,
        for_queries.stages, num_warps=for_queries.warps,
    )  # fmt: skip
    tiles = key_tiles(decay, cu_seqlens, threshold, for_keys.tile, for_keys.block)
    order = tiles.order if kv_heads == heads else _grouped_order(tiles, kv_heads)
    _backward_keys[(len(order),)](
        q, k, v, decay.high, decay.low, grad_out, lse, delta, grad_k, grad_v, column, tiles.bounds, tiles.limit,
        order, tokens, len(tiles.bounds), scale, heads, kv_heads, dim, for_keys.tile, for_keys.block, precision,
        for_keys.stages, num_warps=for_keys.warps,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, gate_gradient(column, cu_seqlens).to(log_forget.dtype)


def _grouped_order(tiles: Tiles, kv_heads: int) -> torch.Tensor:
    """[KV heads * tiles] int32: tiles of all KV heads, those of which their query heads see most first."""
    seen = tiles.limit.unflatten(0, (kv_heads, -1)).sum(1) - tiles.bounds[:, 0]
    return seen.flatten().argsort(descending=True, stable=True).int()
