"""The plan of :mod:`.plan` in Triton. Nothing is read on the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...common import LOG2E
from ...launch import Launcher
from ...whole_sequences import sequence_of, tile_of
from .plan import ANCHOR, Tiles

TOKENS_PER_SUM = 2048
"""So many tokens of a head are summed up together."""
BLOCK_SIZE = 512
"""A program looks at so many tokens, or items, together."""
TILES_PER_BLOCK = 32
"""A program finds the visits of so many tiles."""
ITEMS_PER_BLOCK = 16
"""A program finds the places of so many items in the order of work."""


@triton.jit(do_not_specialize=["tokens", "token_stride", "head_stride"])
def _running_sum(x, c, tokens, token_stride, head_stride, TOKENS_PER_SUM: tl.constexpr):
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    x += head * head_stride
    high, low = c + head * tokens, c + (heads + head) * tokens
    carry = tl.zeros([], tl.float64)
    for first in range(0, tokens, TOKENS_PER_SUM):
        token = first + tl.arange(0, TOKENS_PER_SUM)
        inside = token < tokens
        one = tl.load(x + token.to(tl.int64) * token_stride, mask=inside, other=0.0).to(tl.float64)
        total = carry + tl.cumsum(one, 0)
        carry += tl.sum(one, 0)
        rounded = total.to(tl.float32)
        tl.store(high + token, rounded, mask=inside)
        tl.store(low + token, (total - rounded.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit
def _since(high, low, token, anchor, mask):
    """c_token - c_anchor."""
    near = tl.load(high + token, mask=mask, other=0.0) - tl.load(high + anchor, mask=mask, other=0.0)
    return near + (tl.load(low + token, mask=mask, other=0.0) - tl.load(low + anchor, mask=mask, other=0.0))


@triton.jit(do_not_specialize=["tokens", "sequences", "steps"])
def _since_anchor(c, cu_seqlens, tokens, sequences, steps, ANCHOR: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    sequence = sequence_of(cu_seqlens, sequences, steps, token, 1, 0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int32)
    anchor = token - (token - begin) % ANCHOR
    gone = _since(c + head * tokens, c + (heads + head) * tokens, token, anchor, inside)
    tl.store(c + (2 * heads + head) * tokens + token, gone * LOG2E, mask=inside)


@triton.jit
def _sum_at(high, low, token, mask):
    c = tl.load(high + token, mask=mask, other=0.0).to(tl.float64)
    return c + tl.load(low + token, mask=mask, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["tokens", "tiles", "sequences", "steps", "search_steps"])
def _visits(
    c, threshold, cu_seqlens, bounds, limit, work, tokens, tiles, sequences, steps, search_steps,
    SIZE: tl.constexpr, OTHER: tl.constexpr, GROUP: tl.constexpr, OF_KEYS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tile < tiles
    start, begin, end = tile_of(cu_seqlens, sequences, steps, tile, SIZE)
    used = inside & (start < end)
    if kv_head == 0:
        tl.store(bounds + 3 * tile, start, mask=inside)
        tl.store(bounds + 3 * tile + 1, begin, mask=inside)
        tl.store(bounds + 3 * tile + 2, end, mask=inside)
    total = tl.zeros([BLOCK], tl.int32)
    newest = tl.minimum(start + SIZE, end) - 1
    for group in range(GROUP):
        head = kv_head * GROUP + group
        high = c + head.to(tl.int64) * tokens
        low = high + tl.num_programs(1).to(tl.int64) * GROUP * tokens
        bound = tl.load(threshold + head).to(tl.float64)
        if OF_KEYS:
            # The last query that has not forgotten the tile's last key.
            target = _sum_at(high, low, newest, used) + bound
            first, last = newest, end - 1
            for _ in range(search_steps):
                middle = (first + last + 1) // 2
                sees = _sum_at(high, low, middle, used) >= target
                first = tl.where(sees, middle, first)
                last = tl.where(sees, last, middle - 1)
            edge = (first - begin) // OTHER
            total += edge - (start - begin) // OTHER + 1
        else:
            # The first key that the tile's first query has not forgotten.
            target = _sum_at(high, low, start, used) - bound
            first, last = begin, start
            for _ in range(search_steps):
                middle = (first + last) // 2
                seen = _sum_at(high, low, middle, used) <= target
                last = tl.where(seen, middle, last)
                first = tl.where(seen, first, tl.minimum(middle + 1, last))
            edge = (first - begin) // OTHER
            total += tl.cdiv(newest + 1 - begin, OTHER) - edge
        tl.store(limit + head * tiles + tile, edge, mask=inside)
    tl.store(work + kv_head * tiles + tile, tl.where(used, total, 0), mask=inside)


@triton.jit(do_not_specialize=["items"])
def _rank(work, order, items, ITEMS_PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    mine = tl.program_id(0) * ITEMS_PER_BLOCK + tl.arange(0, ITEMS_PER_BLOCK)
    own = tl.load(work + mine, mask=mine < items, other=0)
    rank = tl.zeros([ITEMS_PER_BLOCK], tl.int32)
    for first in range(0, items, BLOCK):
        other = first + tl.arange(0, BLOCK)
        theirs = tl.load(work + other, mask=other < items, other=-1)
        ahead = (theirs[None, :] > own[:, None]) | (
            (theirs[None, :] == own[:, None]) & (other[None, :] < mine[:, None])
        )
        rank += tl.sum(ahead.to(tl.int32), 1)
    tl.store(order + rank, mine, mask=mine < items)


@triton.jit(do_not_specialize=["tokens", "sequences", "steps"])
def _gate_gradient(sums, grad, cu_seqlens, tokens, sequences, steps, H: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    head = tl.program_id(1)
    sequence = sequence_of(cu_seqlens, sequences, steps, token, 1, 0)
    begin = tl.load(cu_seqlens + sequence).to(tl.int32)
    high = sums + head.to(tl.int64) * tokens
    low = high + H * tokens.to(tl.int64)
    # Sums up to the token before, less what the sequences before add up to.
    some = inside & (token > begin)
    earlier = _sum_at(high, low, token - 1, some)
    earlier -= _sum_at(high, low, begin - 1, some & (begin > 0))
    tl.store(grad + token.to(tl.int64) * H + head, earlier.to(tl.float32), mask=inside)


_sum_launch, _anchor_launch = Launcher(_running_sum), Launcher(_since_anchor)
_visits_launch, _rank_launch = Launcher(_visits), Launcher(_rank)
_gradient_launch = Launcher(_gate_gradient)


def _sums(x: torch.Tensor, c: torch.Tensor, strides: tuple[int, int]) -> None:
    """c[0] + c[1] [H, N] becomes the running sum of x, given its strides from token to token and head to head."""
    _, heads, tokens = c.shape
    _sum_launch((heads, 1, 1), (x, c), (tokens, *strides), (), (TOKENS_PER_SUM,), num_warps=8)


def running_sum(log_forget: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """See :func:`.plan.running_sum`."""
    tokens, heads = log_forget.shape
    c = torch.empty(3, heads, tokens, dtype=torch.float32, device=log_forget.device)
    _sums(log_forget, c, (log_forget.stride(0), log_forget.stride(1)))
    sequences = len(cu_seqlens) - 1
    _anchor_launch(
        (triton.cdiv(tokens, BLOCK_SIZE), heads, 1), (c, cu_seqlens),
        (tokens, sequences, sequences.bit_length()), (), (ANCHOR, BLOCK_SIZE),
    )  # fmt: skip
    return c


def _plan(
    c: torch.Tensor, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int, kv_heads: int,
    of_keys: bool,
) -> Tiles:  # fmt: skip
    _, heads, tokens = c.shape
    sequences = len(cu_seqlens) - 1
    tiles = tokens // size + sequences
    bounds, limit, work, order = (
        torch.empty(shape, dtype=torch.int32, device=c.device)
        for shape in ((tiles, 3), (heads, tiles), (kv_heads * tiles,), (kv_heads * tiles,))
    )
    _visits_launch(
        (triton.cdiv(tiles, TILES_PER_BLOCK), kv_heads, 1), (c, threshold, cu_seqlens, bounds, limit, work),
        (tokens, tiles, sequences, sequences.bit_length(), tokens.bit_length()), (),
        (size, block, heads // kv_heads, of_keys, TILES_PER_BLOCK), num_warps=1,
    )  # fmt: skip
    _rank_launch(
        (triton.cdiv(kv_heads * tiles, ITEMS_PER_BLOCK), 1, 1), (work, order),
        (kv_heads * tiles,), (), (ITEMS_PER_BLOCK, BLOCK_SIZE),
    )  # fmt: skip
    return Tiles(bounds, limit, order)


def query_tiles(c: torch.Tensor, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int) -> Tiles:
    """See :func:`.plan.query_tiles`."""
    return _plan(c, cu_seqlens, threshold, size, block, c.shape[1], False)


def key_tiles(
    c: torch.Tensor, cu_seqlens: torch.Tensor, threshold: torch.Tensor, size: int, block: int, kv_heads: int
) -> Tiles:
    """See :func:`.plan.key_tiles`."""
    return _plan(c, cu_seqlens, threshold, size, block, kv_heads, True)


def gate_gradient(column: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """See :func:`.reference.gate_gradient`."""
    heads, tokens = column.shape
    sums = torch.empty(2, heads, tokens, dtype=torch.float32, device=column.device)
    _sums(column, sums, (1, tokens))
    grad = torch.empty(tokens, heads, dtype=torch.float32, device=column.device)
    sequences = len(cu_seqlens) - 1
    _gradient_launch(
        (triton.cdiv(tokens, BLOCK_SIZE), heads, 1), (sums, grad, cu_seqlens),
        (tokens, sequences, sequences.bit_length()), (), (heads, BLOCK_SIZE),
    )  # fmt: skip
    return grad
