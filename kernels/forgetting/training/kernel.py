"""Forgetting attention over whole sequences in Triton: a program for every tile of queries, or of keys, of a head.

Nothing is accumulated across programs: the backward pass has one kernel for the gradients of queries and one for
those of keys, values and gates, so its results do not depend on the order in which programs run.

The gradient of a logit is ``P_ij (dP_ij - delta_i)`` with ``delta_i = sum_j P_ij dP_ij``. Before any weight is
known again, delta_i is ``grad_out_i . out_i``, from an output that was rounded. What a row's gradients then add up
to, where exact ones add up to zero, is the error of that delta_i. The kernel of the queries adds it to delta_i, and
the kernel of the keys, which runs after it, subtracts the corrected one. Otherwise a gate's gradient, which is a
sum over all keys before it, would collect the errors of all rows before it.

Decay is counted from anchors (:data:`.plan.ANCHOR`): what a row has lost since its own is one number, read like any
other of the row, and between two anchors it is one number for a whole block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import LOG2E
from ...launch import Launcher
from ...whole_sequences import Launch, launches, load
from .plan import ANCHOR
from .plan_kernel import gate_gradient, key_tiles, query_tiles, running_sum


@triton.jit
def _between(c, rest, a, b):
    """(c_a - c_b) log2 e of two anchors."""
    return ((tl.load(c + a) - tl.load(c + b)) + (tl.load(c + rest + a) - tl.load(c + rest + b))) * LOG2E


@triton.jit
def _forward_block(
    query, peak, mass, value, k, v, c, rest, anchor, begin, at, end, query_pos, factor, stride,
    BLOCK: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the softmax's running maximum, sum and value after it."""
    keys = begin + at + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = keys < end
    first = (begin + at).to(tl.int64) * stride
    key = load(k + first + where, inside[:, None], MASKED)
    lost = load(c + 2 * rest + keys, inside, MASKED) + _between(c, rest, begin + at // ANCHOR * ANCHOR, anchor)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor - lost[None, :]
    if MASKED:
        logits = tl.where((query_pos[:, None] >= keys[None, :]) & inside[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    mass = mass * shrink + tl.sum(weights, 1)
    v_block = load(v + first + where, inside[:, None], MASKED)
    value = tl.dot(weights.to(v_block.dtype), v_block, value * shrink[:, None], input_precision=PRECISION)
    return new_peak, mass, value


@triton.jit(do_not_specialize=["tokens", "tiles", "scale"])
def _forward(
    q, k, v, c, out, lse, bounds, limit, order, tokens, tiles, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
        line = head.to(tl.int64) * tokens
        rest = tokens.to(tl.int64) * H
        c += line
        anchor = start - (start - begin) % ANCHOR
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
                query, peak, mass, value, k, v, c, rest, anchor, begin, n * BLOCK, end, rows, factor, KV * D,
                BLOCK, D, ANCHOR, False, PRECISION,
            )  # fmt: skip
        for n in tl.range(diagonal, stop, num_stages=2):
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, c, rest, anchor, begin, n * BLOCK, end, rows, factor, KV * D,
                BLOCK, D, ANCHOR, True, PRECISION,
            )  # fmt: skip
        tl.store(out + at, (value / mass[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
        # With the row's own decay, so that whoever reads it may count decay from where they like.
        own = tl.load(c + 2 * rest + rows, mask=inside, other=0.0)
        tl.store(lse + line + rows, peak + tl.log2(mass) + own, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _row_terms(out, grad_out, lse, c, terms, tokens, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """terms [2, H, N]: what a query adds to its logits (its decay since its anchor less the logarithm of its
    denominator), and delta = out . grad_out."""
    rows, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    inside = rows < tokens
    at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
    x = tl.load(out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    y = tl.load(grad_out + at, mask=inside[:, None], other=0.0).to(tl.float32)
    line, rest = head.to(tl.int64) * tokens + rows, tokens.to(tl.int64) * H
    bias = tl.load(c + 2 * rest + line, mask=inside, other=0.0) - tl.load(lse + line, mask=inside, other=0.0)
    tl.store(terms + line, bias, mask=inside)
    tl.store(terms + rest + line, tl.sum(x * y, 1), mask=inside)


@triton.jit
def _query_block(
    query, grad, bias, delta, grad_query, remainder, k, v, c, rest, anchor, begin, at, end, query_pos, factor,
    stride, BLOCK: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the queries' gradient, and to the sums of their logits' gradients."""
    keys = begin + at + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = keys < end
    first = (begin + at).to(tl.int64) * stride
    key = load(k + first + where, inside[:, None], MASKED)
    value = load(v + first + where, inside[:, None], MASKED)
    lost = load(c + 2 * rest + keys, inside, MASKED) + _between(c, rest, begin + at // ANCHOR * ANCHOR, anchor)
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * factor + (bias[:, None] - lost[None, :])
    if MASKED:
        logits = tl.where((query_pos[:, None] >= keys[None, :]) & inside[None, :], logits, float("-inf"))
    weights = tl.exp2(logits)
    through = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    grad_logits = weights * (through - delta[:, None])
    grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query, remainder + tl.sum(grad_logits, 1)


@triton.jit(do_not_specialize=["tokens", "tiles", "scale"])
def _backward_queries(
    q, k, v, c, grad_out, terms, grad_q, bounds, limit, order, tokens, tiles, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
        line = head.to(tl.int64) * tokens
        rest = tokens.to(tl.int64) * H
        c += line
        bias = tl.load(terms + line + rows, mask=inside, other=0.0)
        delta = tl.load(terms + rest + line + rows, mask=inside, other=0.0)
        anchor = start - (start - begin) % ANCHOR
        k += head // (H // KV) * D
        v += head // (H // KV) * D
        factor = scale * LOG2E
        grad_query = tl.zeros([TILE, D], tl.float32)
        remainder = tl.zeros([TILE], tl.float32)
        diagonal = tl.maximum((start - begin) // BLOCK, first)
        stop = tl.cdiv(tl.minimum(start + TILE, end) - begin, BLOCK)
        for n in tl.range(first, diagonal, num_stages=STAGES):
            grad_query, remainder = _query_block(
                query, grad, bias, delta, grad_query, remainder, k, v, c, rest, anchor, begin, n * BLOCK, end, rows,
                factor, KV * D, BLOCK, D, ANCHOR, False, PRECISION,
            )  # fmt: skip
        for n in tl.range(diagonal, stop, num_stages=1):
            grad_query, remainder = _query_block(
                query, grad, bias, delta, grad_query, remainder, k, v, c, rest, anchor, begin, n * BLOCK, end, rows,
                factor, KV * D, BLOCK, D, ANCHOR, True, PRECISION,
            )  # fmt: skip
        tl.store(grad_q + at, (grad_query * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])
        tl.store(terms + rest + line + rows, delta + remainder, mask=inside)


@triton.jit
def _key_block(
    key, value, lost, grad_key, grad_value, column, q, grad_out, c, rest, terms, anchor, begin, at, end, keys,
    factor, stride, BLOCK: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: what it adds to the gradients of keys, values and gates. Rows are keys here."""
    rows = begin + at + tl.arange(0, BLOCK)
    where = tl.arange(0, BLOCK)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = rows < end
    first = (begin + at).to(tl.int64) * stride
    query = load(q + first + where, inside[:, None], MASKED)
    grad = load(grad_out + first + where, inside[:, None], MASKED)
    bias = load(terms + rows, inside, MASKED) + _between(c, rest, begin + at // ANCHOR * ANCHOR, anchor)
    logits = tl.dot(key, tl.trans(query), input_precision=PRECISION) * factor + (bias[None, :] - lost[:, None])
    if MASKED:
        logits = tl.where((rows[None, :] >= keys[:, None]) & inside[None, :], logits, float("-inf"))
    weights = tl.exp2(logits)
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
    through = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    grad_logits = weights * (through - load(terms + rest + rows, inside, MASKED)[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value, column + tl.sum(grad_logits, 1)


@triton.jit(do_not_specialize=["tokens", "tiles", "scale"])
def _backward_keys(
    q, k, v, c, grad_out, terms, grad_k, grad_v, column, bounds, limit, order, tokens, tiles, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, ANCHOR: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
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
        anchor = start - (start - begin) % ANCHOR
        rest = tokens.to(tl.int64) * H
        grad_key = tl.zeros([TILE, D], tl.float32)
        grad_value = tl.zeros([TILE, D], tl.float32)
        # Blocks from ``clear`` on lie behind the tile's last key; the last of them may reach past the end.
        diagonal, clear = (start - begin) // BLOCK, tl.cdiv(start + TILE - begin, BLOCK)
        for group in range(H // KV):
            head = kv_head * (H // KV) + group
            line = head.to(tl.int64) * tokens
            lost = tl.load(c + 2 * rest + line + keys, mask=inside, other=0.0)
            sums = tl.zeros([TILE], tl.float32)
            last = tl.load(limit + head * tiles + tile)
            whole = tl.minimum(last + 1, (end - begin) // BLOCK)
            for n in tl.range(diagonal, tl.minimum(clear, last + 1), num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, lost, grad_key, grad_value, sums, q + head * D, grad_out + head * D, c + line, rest,
                    terms + line, anchor, begin, n * BLOCK, end, keys, factor, H * D, BLOCK, D, ANCHOR, True,
                    PRECISION,
                )  # fmt: skip
            for n in tl.range(clear, whole, num_stages=STAGES):
                grad_key, grad_value, sums = _key_block(
                    key, value, lost, grad_key, grad_value, sums, q + head * D, grad_out + head * D, c + line, rest,
                    terms + line, anchor, begin, n * BLOCK, end, keys, factor, H * D, BLOCK, D, ANCHOR, False,
                    PRECISION,
                )  # fmt: skip
            for n in tl.range(tl.maximum(clear, whole), last + 1, num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, lost, grad_key, grad_value, sums, q + head * D, grad_out + head * D, c + line, rest,
                    terms + line, anchor, begin, n * BLOCK, end, keys, factor, H * D, BLOCK, D, ANCHOR, True,
                    PRECISION,
                )  # fmt: skip
            tl.store(column + line + keys, sums, mask=inside)
        tl.store(grad_k + at, (grad_key * scale).to(grad_k.dtype.element_ty), mask=inside[:, None])
        tl.store(grad_v + at, grad_value.to(grad_v.dtype.element_ty), mask=inside[:, None])


_launch_forward, _launch_terms = Launcher(_forward), Launcher(_row_terms)
_launch_queries, _launch_keys = Launcher(_backward_queries), Launcher(_backward_keys)


def _constants(q: torch.Tensor, k: torch.Tensor, launch: Launch) -> tuple[int | str, ...]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return (*q.shape[1:2], *k.shape[1:], ANCHOR, launch.tile, launch.block, precision, launch.stages)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_forget: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.forward`; tensors are contiguous. The logarithm returned is to base 2."""
    tokens, heads, dim = q.shape
    launch = launches(dim, q.dtype)[0]
    c = running_sum(log_forget, cu_seqlens)
    tiles = query_tiles(c, cu_seqlens, threshold, launch.tile, launch.block)
    out, lse = q.new_empty(q.shape), torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    _launch_forward(
        (len(tiles.order), 1, 1), (q, k, v, c, out, lse, tiles.bounds, tiles.limit, tiles.order),
        (tokens, len(tiles.bounds), scale), (), _constants(q, k, launch),
        num_warps=launch.warps, maxnreg=launch.registers,
    )  # fmt: skip
    return out, lse, c


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    c: torch.Tensor,
    cu_seqlens: torch.Tensor,
    threshold: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`.reference.backward`."""
    tokens, heads, dim = q.shape
    _, for_queries, for_keys = launches(dim, q.dtype)
    grad_out, column = grad_out.contiguous(), torch.empty_like(lse)
    terms = torch.empty(2, heads, tokens, dtype=torch.float32, device=q.device)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    _launch_terms(
        (triton.cdiv(tokens, 32), heads, 1), (out, grad_out, lse, c, terms), (tokens,), (), (heads, dim, 32)
    )
    tiles = query_tiles(c, cu_seqlens, threshold, for_queries.tile, for_queries.block)
    _launch_queries(
        (len(tiles.order), 1, 1), (q, k, v, c, grad_out, terms, grad_q, tiles.bounds, tiles.limit, tiles.order),
        (tokens, len(tiles.bounds), scale), (), _constants(q, k, for_queries),
        num_warps=for_queries.warps, maxnreg=for_queries.registers,
    )  # fmt: skip
    tiles = key_tiles(c, cu_seqlens, threshold, for_keys.tile, for_keys.block, k.shape[1])
    _launch_keys(
        (len(tiles.order), 1, 1),
        (q, k, v, c, grad_out, terms, grad_k, grad_v, column, tiles.bounds, tiles.limit, tiles.order),
        (tokens, len(tiles.bounds), scale), (), _constants(q, k, for_keys),
        num_warps=for_keys.warps, maxnreg=for_keys.registers,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, gate_gradient(column, cu_seqlens)
