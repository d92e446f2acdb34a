"""Attention over whole sequences whose tokens fade behind a window, in Triton: a program for every tile of queries,
or of keys, of a head.

Behind the window only those tokens are visited of which something is left (:data:`.reference.GONE`). Each KV head
has a list of them in order of position, made by a kernel of its own. Within the window all tokens are whole, except
for the rows of a tile that are far enough from them. Nothing is accumulated across programs, so results do not
depend on the order in which programs run.

The gradient of a logit is ``P_ij (dP_ij - delta_i)`` with ``delta_i = sum_j P_ij dP_ij``. At first delta_i is
``grad_out_i . out_i``, from an output that was rounded. What a row's gradients then add up to, where exact ones add
up to zero, is the error of that delta_i. The kernel of the queries corrects it for the kernels of the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...common import LOG2E
from ...launch import Launcher
from ...whole_sequences import Launch, launches, load, sequence_of, tile_of
from .reference import GONE

CHUNK = 1024
"""Tokens that the kernel of the lists reads at once."""


class _Left(NamedTuple):
    """The tokens of which something is left behind their window, by KV head.

    Attributes:
        token: [KV heads, N + CHUNK] int32: which they are, in order; zeros follow.
        kept: the same of float32: their log_kept, to base 2; -inf follows.
        before: [KV heads, N + 1] int32: how many there are before each token.
    """

    token: torch.Tensor
    kept: torch.Tensor
    before: torch.Tensor


@triton.jit(do_not_specialize=["tokens", "gone"])
def _list_left(
    log_kept, token, kept, before, tokens, gone,
    KV: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    token += head.to(tl.int64) * (tokens + CHUNK)
    kept += head.to(tl.int64) * (tokens + CHUNK)
    before += head.to(tl.int64) * (tokens + 1)
    count = 0
    for first in range(0, tokens, CHUNK):
        at = first + tl.arange(0, CHUNK)
        inside = at < tokens
        value = tl.load(log_kept + at.to(tl.int64) * KV + head, mask=inside, other=float("-inf"))
        left = (value >= gone) & inside
        rank = count + tl.cumsum(left.to(tl.int32), 0) - left.to(tl.int32)
        tl.store(before + at, rank, mask=inside)
        tl.store(token + rank, at, mask=left)
        tl.store(kept + rank, value * LOG2E, mask=left)
        count += tl.sum(left.to(tl.int32), 0)
    tl.store(before + tokens, count)
    # A block of the list may reach beyond its end.
    at = count + tl.arange(0, CHUNK)
    tl.store(token + at, tl.zeros([CHUNK], tl.int32))
    tl.store(kept + at, tl.full([CHUNK], float("-inf"), tl.float32))


@triton.jit
def _logits(product, kept, keys, rows, factor, window, BEHIND: tl.constexpr):
    """Logits to base 2 of a block [queries, keys]. All pairs are behind the window where ``BEHIND``, else some."""
    if BEHIND:
        return product * factor + kept[None, :]
    back = rows[:, None] - keys[None, :]
    logits = product * factor + tl.where(back > window, kept[None, :], 0.0)
    return tl.where(back >= 0, logits, float("-inf"))


@triton.jit
def _forward_block(
    query, peak, mass, value, k, v, keys, kept, inside, rows, factor, window, stride,
    D: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: the softmax's running maximum, sum and value after it."""
    where = keys.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    key = load(k + where, inside[:, None], not BEHIND)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    logits = _logits(product, kept, keys, rows, factor, window, BEHIND)
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    weights = tl.exp2(logits - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    mass = mass * shrink + tl.sum(weights, 1)
    v_block = load(v + where, inside[:, None], not BEHIND)
    value = tl.dot(weights.to(v_block.dtype), v_block, value * shrink[:, None], input_precision=PRECISION)
    return new_peak, mass, value


@triton.jit
def _window_keys(log_kept, first, end, gone, stride, BLOCK: tl.constexpr):
    """A block of neighbouring keys: their positions, log_kept to base 2, and which are before ``end``."""
    keys = first + tl.arange(0, BLOCK)
    inside = keys < end
    kept = tl.load(log_kept + keys.to(tl.int64) * stride, mask=inside, other=0.0)
    return keys, tl.where(kept < gone, float("-inf"), kept * LOG2E), inside


@triton.jit
def _listed_keys(token, kept, first, end, BLOCK: tl.constexpr):
    """A block of a list of keys: their positions and log_kept to base 2, which is -inf from ``end`` on."""
    entries = first + tl.arange(0, BLOCK)
    keys = tl.load(token + entries)
    return keys, tl.where(entries < end, tl.load(kept + entries), float("-inf")), entries < end


@triton.jit(do_not_specialize=["tokens", "sequences", "steps", "window", "scale", "gone"])
def _forward(
    q, k, v, log_kept, token, kept, before, out, lse, cu_seqlens, tokens, sequences, steps, window, scale, gone,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # The last tiles of a sequence see most, and are the first to run.
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    start, begin, end = tile_of(cu_seqlens, sequences, steps, tile, TILE)
    if start < end:
        rows = start + tl.arange(0, TILE)
        inside = rows < end
        at = rows.to(tl.int64)[:, None] * (H * D) + head * D + tl.arange(0, D)[None, :]
        query = tl.load(q + at, mask=inside[:, None], other=0.0)
        kv_head = head // (H // KV)
        k += kv_head * D
        v += kv_head * D
        log_kept += kv_head
        token += kv_head.to(tl.int64) * (tokens + CHUNK)
        kept += kv_head.to(tl.int64) * (tokens + CHUNK)
        before += kv_head.to(tl.int64) * (tokens + 1)
        factor = scale * LOG2E
        # A row with -inf as its largest logit so far would make NaN of exp2(-inf - -inf).
        peak = tl.full([TILE], -1e30, tl.float32)
        mass = tl.zeros([TILE], tl.float32)
        value = tl.zeros([TILE, D], tl.float32)
        # Keys before ``edge`` are behind the window of all rows.
        edge, stop = tl.maximum(start - window, begin), tl.minimum(start + TILE, end)
        last = tl.load(before + edge)
        for n in tl.range(tl.load(before + begin), last, BLOCK, num_stages=STAGES):
            keys, fading, there = _listed_keys(token, kept, n, last, BLOCK)
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, keys, fading, there, rows, factor, window, KV * D,
                D, True, PRECISION,
            )  # fmt: skip
        for n in tl.range(edge, stop, BLOCK, num_stages=STAGES):
            keys, fading, there = _window_keys(log_kept, n, end, gone, KV, BLOCK)
            peak, mass, value = _forward_block(
                query, peak, mass, value, k, v, keys, fading, there, rows, factor, window, KV * D,
                D, False, PRECISION,
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
    query, grad, lse, delta, grad_query, remainder, k, v, keys, kept, inside, rows, factor, window, stride,
    D: tl.constexpr, BEHIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the queries' gradient, and to the sums of their logits' gradients."""
    where = keys.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    key = load(k + where, inside[:, None], not BEHIND)
    value = load(v + where, inside[:, None], not BEHIND)
    product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    logits = _logits(product, kept, keys, rows, factor, window, BEHIND)
    weights = tl.exp2(logits - lse[:, None])
    through = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
    grad_logits = weights * (through - delta[:, None])
    grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query, remainder + tl.sum(grad_logits, 1)


@triton.jit(do_not_specialize=["tokens", "sequences", "steps", "window", "scale", "gone"])
def _backward_queries(
    q, k, v, log_kept, token, kept, before, grad_out, lse, delta, grad_q, cu_seqlens,
    tokens, sequences, steps, window, scale, gone,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    start, begin, end = tile_of(cu_seqlens, sequences, steps, tile, TILE)
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
        token += kv_head.to(tl.int64) * (tokens + CHUNK)
        kept += kv_head.to(tl.int64) * (tokens + CHUNK)
        before += kv_head.to(tl.int64) * (tokens + 1)
        factor = scale * LOG2E
        grad_query = tl.zeros([TILE, D], tl.float32)
        remainder = tl.zeros([TILE], tl.float32)
        edge, stop = tl.maximum(start - window, begin), tl.minimum(start + TILE, end)
        last = tl.load(before + edge)
        for n in tl.range(tl.load(before + begin), last, BLOCK, num_stages=STAGES):
            keys, fading, there = _listed_keys(token, kept, n, last, BLOCK)
            grad_query, remainder = _query_block(
                query, grad, mine, product, grad_query, remainder, k, v, keys, fading, there, rows, factor, window,
                KV * D, D, True, PRECISION,
            )  # fmt: skip
        for n in tl.range(edge, stop, BLOCK, num_stages=1):
            keys, fading, there = _window_keys(log_kept, n, end, gone, KV, BLOCK)
            grad_query, remainder = _query_block(
                query, grad, mine, product, grad_query, remainder, k, v, keys, fading, there, rows, factor, window,
                KV * D, D, False, PRECISION,
            )  # fmt: skip
        tl.store(grad_q + at, (grad_query * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])
        tl.store(delta + line, product + remainder, mask=inside)


@triton.jit
def _key_block(
    key, value, keys, kept, ends, grad_key, grad_value, grad_kept, q, grad_out, lse, delta, first, stop, factor,
    window, stride, BLOCK: tl.constexpr, D: tl.constexpr, CLEAR: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries: what it adds to the gradients of keys, values and log_kept. Rows are keys here.

    Either only pairs in the window count, or only those behind it. Where ``CLEAR``, all are behind it.
    """
    rows = first + tl.arange(0, BLOCK)
    where = rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    inside = rows < stop
    query = load(q + where, inside[:, None], not CLEAR)
    grad = load(grad_out + where, inside[:, None], not CLEAR)
    product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
    logits = product * factor
    if not WINDOW:
        logits += kept[:, None]
    if not CLEAR:
        back = rows[None, :] - keys[:, None]
        if WINDOW:
            counts = (back >= 0) & (back <= window)
        else:
            counts = back > window
        logits = tl.where(counts & (rows[None, :] < ends[:, None]), logits, float("-inf"))
    weights = tl.exp2(logits - load(lse + rows, inside, not CLEAR)[None, :])
    grad_value = tl.dot(weights.to(grad.dtype), grad, grad_value, input_precision=PRECISION)
    through = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
    grad_logits = weights * (through - load(delta + rows, inside, not CLEAR)[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    if not WINDOW:
        grad_kept += tl.sum(grad_logits, 1)
    return grad_key, grad_value, grad_kept


@triton.jit(do_not_specialize=["tokens", "sequences", "steps", "window", "scale"])
def _backward_window(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, cu_seqlens, tokens, sequences, steps, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values through the queries in whose window they are."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    start, _, end = tile_of(cu_seqlens, sequences, steps, tile, TILE)
    if start < end:
        keys = start + tl.arange(0, TILE)
        inside = keys < end
        at = keys.to(tl.int64)[:, None] * (KV * D) + kv_head * D + tl.arange(0, D)[None, :]
        key = tl.load(k + at, mask=inside[:, None], other=0.0)
        value = tl.load(v + at, mask=inside[:, None], other=0.0)
        factor = scale * LOG2E
        grad_key = tl.zeros([TILE, D], tl.float32)
        grad_value = tl.zeros([TILE, D], tl.float32)
        nothing = tl.zeros([TILE], tl.float32)
        ends = tl.zeros([TILE], tl.int32) + end
        stop = tl.minimum(start + TILE + window, end)
        for group in range(H // KV):
            head = kv_head * (H // KV) + group
            line = head.to(tl.int64) * tokens
            for n in tl.range(start, stop, BLOCK, num_stages=1):
                grad_key, grad_value, nothing = _key_block(
                    key, value, keys, nothing, ends, grad_key, grad_value, nothing, q + head * D,
                    grad_out + head * D, lse + line, delta + line, n, stop, factor, window, H * D,
                    BLOCK, D, False, True, PRECISION,
                )  # fmt: skip
        tl.store(grad_k + at, grad_key * scale, mask=inside[:, None])
        tl.store(grad_v + at, grad_value, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "sequences", "steps", "window", "scale"])
def _backward_behind(
    q, k, v, token, kept, before, grad_out, lse, delta, grad_k, grad_v, grad_kept, cu_seqlens,
    tokens, sequences, steps, window, scale,
    H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add the gradients of what is left of keys and values behind the window, and take that of log_kept."""
    # The first tiles of a sequence are seen most.
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    token += kv_head.to(tl.int64) * (tokens + CHUNK)
    kept += kv_head.to(tl.int64) * (tokens + CHUNK)
    count = tl.load(before + kv_head.to(tl.int64) * (tokens + 1) + tokens)
    if tile * TILE < count:
        keys, fading, there = _listed_keys(token, kept, tile * TILE, count, TILE)
        at = keys.to(tl.int64)[:, None] * (KV * D) + kv_head * D + tl.arange(0, D)[None, :]
        key = tl.load(k + at)
        value = tl.load(v + at)
        until = tl.load(cu_seqlens + sequence_of(cu_seqlens, sequences, steps, keys, 1, 0) + 1).to(tl.int32)
        first = tl.load(token + tile * TILE)
        last = tl.load(token + tl.minimum(tile * TILE + TILE, count) - 1)
        begin, stop = first + window + 1, tl.max(tl.where(there, until, 0), 0)
        # From ``clear`` on all keys are behind the window of all queries, unless there are several sequences here.
        # The last block may be cut off.
        alone = tl.min(tl.where(there, until, stop), 0) == stop
        edge = tl.where(alone, tl.minimum(last + window + 1, stop), stop)
        clear = begin + tl.cdiv(tl.maximum(edge - begin, 0), BLOCK) * BLOCK
        whole = clear + tl.maximum(stop - clear, 0) // BLOCK * BLOCK
        factor = scale * LOG2E
        grad_key = tl.zeros([TILE, D], tl.float32)
        grad_value = tl.zeros([TILE, D], tl.float32)
        sums = tl.zeros([TILE], tl.float32)
        for group in range(H // KV):
            head = kv_head * (H // KV) + group
            line = head.to(tl.int64) * tokens
            for n in tl.range(begin, tl.minimum(clear, stop), BLOCK, num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, keys, fading, until, grad_key, grad_value, sums, q + head * D, grad_out + head * D,
                    lse + line, delta + line, n, stop, factor, window, H * D, BLOCK, D, False, False, PRECISION,
                )  # fmt: skip
            for n in tl.range(clear, whole, BLOCK, num_stages=STAGES):
                grad_key, grad_value, sums = _key_block(
                    key, value, keys, fading, until, grad_key, grad_value, sums, q + head * D, grad_out + head * D,
                    lse + line, delta + line, n, stop, factor, window, H * D, BLOCK, D, True, False, PRECISION,
                )  # fmt: skip
            for n in tl.range(whole, stop, BLOCK, num_stages=1):
                grad_key, grad_value, sums = _key_block(
                    key, value, keys, fading, until, grad_key, grad_value, sums, q + head * D, grad_out + head * D,
                    lse + line, delta + line, n, stop, factor, window, H * D, BLOCK, D, False, False, PRECISION,
                )  # fmt: skip
        mine = there[:, None]
        tl.store(grad_k + at, tl.load(grad_k + at, mask=mine, other=0.0) + grad_key * scale, mask=mine)
        tl.store(grad_v + at, tl.load(grad_v + at, mask=mine, other=0.0) + grad_value, mask=mine)
        tl.store(grad_kept + keys.to(tl.int64) * KV + kv_head, sums, mask=there)


_launch_list, _launch_forward, _launch_terms = Launcher(_list_left), Launcher(_forward), Launcher(_row_terms)
_launch_queries = Launcher(_backward_queries)
_launch_window, _launch_behind = Launcher(_backward_window), Launcher(_backward_behind)


def _left(log_kept: torch.Tensor) -> _Left:
    """List what is left of each KV head's tokens [N, KV heads]."""
    tokens, heads = log_kept.shape
    token = torch.empty(heads, tokens + CHUNK, dtype=torch.int32, device=log_kept.device)
    left = _Left(token, torch.empty_like(token, dtype=torch.float32), token.new_empty(heads, tokens + 1))
    _launch_list((heads, 1, 1), (log_kept, *left), (tokens, GONE), (), (heads, CHUNK))
    return left


def _constants(q: torch.Tensor, k: torch.Tensor, launch: Launch) -> tuple[int | str, ...]:
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    return q.shape[1], *k.shape[1:], launch.tile, launch.block, precision


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
    sequences = len(cu_seqlens) - 1
    launch = launches(dim, q.dtype)[0]
    out, lse = torch.empty_like(q), torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    _launch_forward(
        (tokens // launch.tile + sequences, heads, 1),
        (q, k, v, log_kept, *_left(log_kept), out, lse, cu_seqlens),
        (tokens, sequences, sequences.bit_length(), window, scale, GONE), (),
        (*_constants(q, k, launch), launch.stages, CHUNK), num_warps=launch.warps, maxnreg=launch.registers,
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
    kv_heads, sequences = k.shape[1], len(cu_seqlens) - 1
    sizes = (tokens, sequences, sequences.bit_length(), window, scale)
    _, for_queries, for_keys = launches(dim, q.dtype)
    left, delta, grad_q = _left(log_kept), torch.empty_like(lse), torch.empty_like(q)
    # Two kernels add to these, one after the other.
    grad_k, grad_v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    grad_kept = torch.zeros(log_kept.shape, dtype=torch.float32, device=q.device)
    _launch_terms((triton.cdiv(tokens, 32), heads, 1), (out, grad_out, delta), (tokens,), (), (heads, dim, 32))
    _launch_queries(
        (tokens // for_queries.tile + sequences, heads, 1),
        (q, k, v, log_kept, *left, grad_out, lse, delta, grad_q, cu_seqlens), (*sizes, GONE), (),
        (*_constants(q, k, for_queries), for_queries.stages, CHUNK),
        num_warps=for_queries.warps, maxnreg=for_queries.registers,
    )  # fmt: skip
    _launch_window(
        (tokens // for_keys.tile + sequences, kv_heads, 1),
        (q, k, v, grad_out, lse, delta, grad_k, grad_v, cu_seqlens), sizes, (), _constants(q, k, for_keys),
        num_warps=for_keys.warps, maxnreg=for_keys.registers,
    )  # fmt: skip
    _launch_behind(
        (triton.cdiv(tokens, for_keys.tile), kv_heads, 1),
        (q, k, v, *left, grad_out, lse, delta, grad_k, grad_v, grad_kept, cu_seqlens), sizes, (),
        (*_constants(q, k, for_keys), for_keys.stages, CHUNK),
        num_warps=for_keys.warps, maxnreg=for_keys.registers,
    )  # fmt: skip
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_kept
