"""Attention over whole sequences whose tokens fade behind a window, in Triton: a program for every tile of queries,
or of keys, of a head.

Nothing is accumulated across programs, so results do not depend on the order in which programs run. Blocks that lie
wholly behind the window add the keys' logarithms to all their logits. Those in the window or at an edge are masked.

The gradient of a logit is ``P_ij (dP_ij - delta_i)`` with ``delta_i = sum_j P_ij dP_ij``. At first delta_i is
``grad_out_i . out_i``, from an output that was rounded. What a row's gradients then add up to, where exact ones add
up to zero, is the error of that delta_i. The kernel of the queries corrects it for the kernel of the keys.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import LOG2E
from ...launch import Launcher
from ...segments import tile_bounds
from ...whole_sequences import Launch, launches, load


@triton.jit
def _logits(
    product, log_kept, keys, rows, inside, factor, window,
    BEHIND: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of a block [queries, keys], or [keys, queries]; ``inside`` [keys] or [queries], of the axis
    that is walked along."""
    kept = log_kept * LOG2E
    if KEYS_FIRST:
        key, row, fading, walked = keys[:, None], rows[None, :], kept[:, None], inside[None, :]
    else:
        key, row, fading, walked = keys[None, :], rows[:, None], kept[None, :], inside[None, :]
    if BEHIND:
        return product * factor + fading
    logits = product * factor + tl.where(row - key > window, fading, 0.0)
    return tl.where((row >= key) & walked, logits, float("-inf"))


@triton.jit
def _forward_block(
    query, peak, mass, value, k, v, log_kept, begin, at, end, rows, factor, window, stride, kept_stride,
    BLOCK: tl.constexpr, D: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the softmax's running maximum, sum and value after it."""
    keys = begin + at + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = keys < end
    first = (begin + at).to(tl.int64) * stride
    key = load(k + first + where, inside[:, None], not BEHIND)
    kept = load(log_kept + keys.to(tl.int64) * kept_stride, inside, not BEHIND)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    logits = _logits(product, kept, keys, rows, inside, factor, window, BEHIND, False)
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    mass = mass * shrink + tl.sum(weights, 1)
    v_block = load(v + first + where, inside[:, None], not BEHIND)
    value = tl.dot(weights.to(v_block.dtype), v_block, value * shrink[:, None], input_precision=PRECISION)
    return new_peak, mass, value


@triton.jit(do_not_specialize=["tokens", "tiles", "window", "scale"])
def _forward(
    q, k, v, log_kept, out, lse, bounds, tokens, tiles, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The last tiles of a sequence see most, and are the first to run.
    tile, head = tiles - 1 - tl.program_id(0), tl.program_id(1)
    start, begin, end = tl.load(bounds + 3 * tile), tl.load(bounds + 3 * tile + 1), tl.load(bounds + 3 * tile + 2)
    if start < end:
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
        query = tl.load(q + at, mask=inside[:, None], other=0.0)
        kv_head = head // (H // KV)
        k += kv_head * D
        v += kv_head * D
        log_kept += kv_head
        factor = scale * LOG2E
        # A row with -inf as its largest logit so far would make NaN of exp2(-inf - -inf).
        peak = tl.full([TILE], -1e30, tl.float32)
        mass = tl.zeros([TILE], tl.float32)
        value = tl.zeros([TILE, D], tl.float32)
        behind = tl.maximum(start - begin - window, 0) // BLOCK
        stop = tl.cdiv(tl.minimum(start + TILE, end) - begin, BLOCK)
        for n in tl.range(0, behind, num_stages=STAGES):
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, log_kept, begin, n * BLOCK, end, rows, factor, window, KV * D, KV,
                BLOCK, D, True, PRECISION,
            )  # fmt: skip
        for n in tl.range(behind, stop, num_stages=STAGES):
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, log_kept, begin, n * BLOCK, end, rows, factor, window, KV * D, KV,
                BLOCK, D, False, PRECISION,
            )  # fmt: skip
        tl.store(out + at, (value / mass[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
        tl.store(lse + head.to(tl.int64) * tokens + rows, peak + tl.log2(mass), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _row_terms(out, grad_out, delta, tokens, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """delta [H, N] = out . grad_out."""
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inside = rows < tokens
    at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
    x = tl.load(out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(grad_out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * tokens + rows, tl.sum(x * y, 1), mask=inside)


@triton.jit
def _query_block(
    query, grad, lse, delta, grad_query, remainder, k, v, log_kept, begin, at, end, rows, factor, window, stride,
    kept_stride, BLOCK: tl.constexpr, D: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the queries' gradient, and to the sums of their logits' gradients."""
    keys = begin + at + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = keys < end
    first = (begin + at).to(tl.int64) * stride
    key = load(k + first + where, inside[:, None], not BEHIND)
    value = load(v + first + where, inside[:, None], not BEHIND)
    kept = load(log_kept + keys.to(tl.int64) * kept_stride, inside, not BEHIND)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    logits = _logits(product, kept, keys, rows, inside, factor, window, BEHIND, False)
    weights = tl.exp2(logits - lse[:, None])
    through = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    grad_logits = weights * (through - delta[:, None])
    grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query, remainder + tl.sum(grad_logits, 1)


@triton.jit(do_not_specialize=["tokens", "tiles", "window", "scale"])
def _backward_queries(
    q, k, v, log_kept, grad_out, lse, delta, grad_q, bounds, tokens, tiles, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, head = tiles - 1 - tl.program_id(0), tl.program_id(1)
    start, begin, end = tl.load(bounds + 3 * tile), tl.load(bounds + 3 * tile + 1), tl.load(bounds + 3 * tile + 2)
    if start < end:
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
        query = tl.load(q + at, mask=inside[:, None], other=0.0)
        grad = tl.load(grad_out + at, mask=inside[:, None], other=0.0)
        line = head.to(tl.int64) * tokens + rows
        mine = tl.load(lse + line, mask=inside, other=0.0)
        product = tl.load(delta + line, mask=inside, other=0.0)
        kv_head = head // (H // KV)
        k += kv_head * D
        v += kv_head * D
        log_kept += kv_head
        factor = scale * LOG2E
        grad_query = tl.zeros([TILE, D], tl.float32)
        remainder = tl.zeros([TILE], tl.float32)
        behind = tl.maximum(start - begin - window, 0) // BLOCK
        stop = tl.cdiv(tl.minimum(start + TILE, end) - begin, BLOCK)
        for n in tl.range(0, behind, num_stages=STAGES):
            grad_query, remainder = _query_block(
                query, grad, mine, product, grad_query, remainder, k, v, log_kept, begin, n * BLOCK, end, rows,
                factor, window, KV * D, KV, BLOCK, D, True, PRECISION,
            )  # fmt: skip
        for n in tl.range(behind, stop, num_stages=1):
            grad_query, remainder = _query_block(
                query, grad, mine, product, grad_query, remainder, k, v, log_kept, begin, n * BLOCK, end, rows,
                factor, window, KV * D, KV, BLOCK, D, False, PRECISION,
            )  # fmt: skip
        tl.store(grad_q + at, (grad_query * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])
        tl.store(delta + line, product + remainder, mask=inside)


@triton.jit
def _key_block(
    key, value, kept, grad_key, grad_value, grad_kept, q, grad_out, lse, delta, begin, at, end, keys, factor,
    window, stride, BLOCK: tl.constexpr, D: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: what it adds to the gradients of keys, values and log_kept. Rows are keys here."""
    rows = begin + at + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = rows < end
    first = (begin + at).to(tl.int64) * stride
    query = load(q + first + where, inside[:, None], not BEHIND)
    grad = load(grad_out + first + where, inside[:, None], not BEHIND)
    product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    logits = _logits(product, kept, keys, rows, inside, factor, window, BEHIND, True)
    weights = tl.exp2(logits - load(lse + rows, inside, not BEHIND)[None, :])
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
    through = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    grad_logits = weights * (through - load(delta + rows, inside, not BEHIND)[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    if BEHIND:
        grad_kept += tl.sum(grad_logits, 1)
    else:
        grad_kept += tl.sum(tl.where(rows[None, :] - keys[:, None] > window, grad_logits, 0.0), 1)
    return grad_key, grad_value, grad_kept


@triton.jit(do_not_specialize=["tokens", "tiles", "window", "scale"])
def _backward_keys(
    q, k, v, log_kept, grad_out, lse, delta, grad_k, grad_v, grad_kept, bounds, tokens, tiles, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The first tiles of a sequence are seen most.
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    start, begin, end = tl.load(bounds + 3 * tile), tl.load(bounds + 3 * tile + 1), tl.load(bounds + 3 * tile + 2)
    if start < end:
        keys = start + tl.arange(0, TILE)
        inside = keys < end
        at = keys.to(tl.int64)[:, None] * (KV * D) + kv_head * D + tl.arange(0, D)[None, :]
        key = tl.load(k + at, mask=inside[:, None], other=0.0)
        value = tl.load(v + at, mask=inside[:, None], other=0.0)
        fading = keys.to(tl.int64) * KV + kv_head
        kept = tl.load(log_kept + fading, mask=inside, other=0.0)
        factor = scale * LOG2E
        grad_key = tl.zeros([TILE, D], tl.float32)
        grad_value = tl.zeros([TILE, D], tl.float32)
        sums = tl.zeros([TILE], tl.float32)
        # From block ``clear`` on all queries have all keys behind their window; the last block may be cut off.
        first, stop = (start - begin) // BLOCK, tl.cdiv(end - begin, BLOCK)
        clear = tl.minimum(tl.cdiv(start + TILE + window - begin, BLOCK), stop)
        whole = tl.maximum(clear, (end - begin) // BLOCK)
        for group in range(H // KV):
            head = kv_head * (H // KV) + group
            line = head.to(tl.int64) * tokens
            for n in tl.range(first, clear, num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, kept, grad_key, grad_value, sums, q + head * D, grad_out + head * D, lse + line,
                    delta + line, begin, n * BLOCK, end, keys, factor, window, H * D, BLOCK, D, False, PRECISION,
                )  # fmt: skip
            for n in tl.range(clear, whole, num_stages=STAGES):
                grad_key, grad_value, sums = _key_block(
                    key, value, kept, grad_key, grad_value, sums, q + head * D, grad_out + head * D, lse + line,
                    delta + line, begin, n * BLOCK, end, keys, factor, window, H * D, BLOCK, D, True, PRECISION,
                )  # fmt: skip
            for n in tl.range(whole, stop, num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, kept, grad_key, grad_value, sums, q + head * D, grad_out + head * D, lse + line,
                    delta + line, begin, n * BLOCK, end, keys, factor, window, H * D, BLOCK, D, False, PRECISION,
                )  # fmt: skip
        tl.store(grad_k + at, (grad_key * scale).to(grad_k.dtype.element_ty), mask=inside[:, None])
        tl.store(grad_v + at, grad_value.to(grad_v.dtype.element_ty), mask=inside[:, None])
        tl.store(grad_kept + fading, sums, mask=inside)


_launch_forward, _launch_terms = Launcher(_forward), Launcher(_row_terms)
_launch_queries, _launch_keys = Launcher(_backward_queries), Launcher(_backward_keys)


def _constants(q: torch.Tensor, k: torch.Tensor, launch: Launch) -> tuple[int | str, ...]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return q.shape[1], *k.shape[1:], launch.tile, launch.block, precision, launch.stages


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`.reference.forward`; tensors are contiguous. The logarithm returned is to base 2."""
    tokens, heads, dim = q.shape
    launch = launches(dim, q.dtype)[0]
    bounds = tile_bounds(cu_seqlens, tokens, launch.tile).int()
    out, lse = q.new_empty(q.shape), torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    _launch_forward(
        (len(bounds), heads, 1), (q, k, v, log_kept, out, lse, bounds), (tokens, len(bounds), window, scale), (),
        _constants(q, k, launch), num_warps=launch.warps, maxnreg=launch.registers,
    )  # fmt: skip
    return out, lse


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_kept: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`; tensors are contiguous."""
    tokens, heads, dim = q.shape
    _, for_queries, for_keys = launches(dim, q.dtype)
    delta = torch.empty_like(lse)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    grad_kept = torch.empty(log_kept.shape, dtype=torch.float32, device=q.device)
    _launch_terms((triton.cdiv(tokens, 32), heads, 1), (out, grad_out, delta), (tokens,), (), (heads, dim, 32))
    bounds = tile_bounds(cu_seqlens, tokens, for_queries.tile).int()
    _launch_queries(
        (len(bounds), heads, 1), (q, k, v, log_kept, grad_out, lse, delta, grad_q, bounds),
        (tokens, len(bounds), window, scale), (), _constants(q, k, for_queries),
        num_warps=for_queries.warps, maxnreg=for_queries.registers,
    )  # fmt: skip
    bounds = tile_bounds(cu_seqlens, tokens, for_keys.tile).int()
    _launch_keys(
        (len(bounds), k.shape[1], 1),
        (q, k, v, log_kept, grad_out, lse, delta, grad_k, grad_v, grad_kept, bounds),
        (tokens, len(bounds), window, scale), (), _constants(q, k, for_keys),
        num_warps=for_keys.warps, maxnreg=for_keys.registers,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_kept
