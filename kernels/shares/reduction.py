"""What programs have summed up of one item, joined by the last of them."""

from __future__ import annotations

import triton
import triton.language as tl

NUMBERS_AT_ONCE = 4096
"""A warp joins so many numbers of an item's stretches together, in 128 of each thread's registers."""


def stretches_at_once(head_dim: int, groups: int, warps: int) -> int:
    """Stretches of an item that are joined together: as many as registers hold, up to 16."""
    numbers = int(triton.next_power_of_2(head_dim)) * int(triton.next_power_of_2(groups))
    return max(1, min(16, NUMBERS_AT_ONCE * warps // numbers))


@triton.jit
def hand_in(
    value, peak, mass, decay, out, partials, arrived, program, share, first, behind, begins, token, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    JOINED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Leave what a program has summed up of an item that others work on too; the last of them writes the output.

    The stretches are added up from the newest to the oldest whoever is the last, so that every run gives the same
    bits.

    Args:
        value, peak, mass, decay: [GROUP, BLOCK_D] and three times [GROUP]: the numbers of
            :attr:`.plan.DecodePlan.partials`, of which G rows and D columns count.
        program, share: the number of the program, and of pages that each program takes.
        first, behind: the item's first page in the line of all pages, and the one behind its last.
        begins: whether the item begins in this program's share.
        token, head: row of the query, and its KV head.
    """
    g, dim = tl.arange(0, GROUP), tl.arange(0, BLOCK_D)
    part = partials + ((program * 2 + begins.to(tl.int32)) * G + g) * (D + 3)
    tl.store(part[:, None] + dim[None, :], value, mask=(g < G)[:, None] & (dim < D)[None, :])
    tl.store(part + D, peak, mask=g < G)
    tl.store(part + D + 1, mass, mask=g < G)
    tl.store(part + D + 2, decay, mask=g < G)
    owner, last = first // share, (behind - 1) // share
    tl.debug_barrier()  # all threads have written before one says so
    before_this = tl.atomic_add(arrived + owner, 1, sem="acq_rel")
    if before_this == last - owner:
        tl.store(arrived + owner, 0)
        _join(out, partials, owner, last, token, head, D, BLOCK_D, H, G, JOINED, AT_ONCE)


@triton.jit
def _join(
    out, partials, owner, last, token, head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Join the stretches of the item that begins in program ``owner`` and ends in program ``last``."""
    dim, group = tl.arange(0, BLOCK_D), tl.arange(0, GROUP)
    asked = (group < G)[:, None] & (dim < D)[None, :]
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    mass, decay = tl.zeros([GROUP], tl.float32), tl.zeros([GROUP], tl.float32)
    value = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in range(owner, last + 1, AT_ONCE):
        # [stretches, query heads], and with d behind them.
        source = start + tl.arange(0, AT_ONCE)
        valid = (source <= last)[:, None] & (group < G)[None, :]
        slot = source * 2 + (source == owner).to(tl.int32)
        part = partials + (slot[:, None] * G + group[None, :]) * (D + 3)
        there = valid[:, :, None] & (dim < D)[None, None, :]
        values = tl.load(part[:, :, None] + dim[None, None, :], mask=there, other=0.0)
        stretch = tl.load(part + D + 2, mask=valid, other=0.0)
        before = decay[None, :] + tl.cumsum(stretch, 0) - stretch
        peaks = tl.load(part + D, mask=valid, other=float("-inf")) + before
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        # A query head that there is not has no peak.
        anchor = tl.where(group < G, new_peak, 0.0)
        weights = tl.exp2(peaks - anchor[None, :])
        shrink = tl.exp2(peak - anchor)
        mass = mass * shrink + tl.sum(weights * tl.load(part + D + 1, mask=valid, other=0.0), 0)
        value = value * shrink[:, None] + tl.sum(weights[:, :, None] * values, 0)
        peak = new_peak
        decay += tl.sum(stretch, 0)
    result = (value / mass[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token * H * G + head * G + group)[:, None] * D + dim[None, :], result, mask=asked)
