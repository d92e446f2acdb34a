"""What programs have summed up of one item, joined."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import Launcher
from ..paged import Batch
from .plan import DecodePlan

SPLITS_PER_BLOCK = 16
"""So many stretches of one item are joined together."""


@triton.jit(do_not_specialize=["query_start", "item_start", "items"])
def _join(
    out, open_item, partials, query_start, item_start, items,
    D: tl.constexpr, BLOCK_D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr,
    SPLITS_PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """Join the stretches of the item that begins, but does not end, in a program's share."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    item = tl.load(open_item + program)
    if item < 0:
        return
    share = tl.cdiv(tl.load(item_start + items), programs)
    last = (tl.load(item_start + item + 1) - 1) // share
    row, head = item // H, item % H
    dim, group = tl.arange(0, BLOCK_D), tl.arange(0, GROUP)
    asked = (group < G)[:, None] & (dim < D)[None, :]
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    mass, decay = tl.zeros([GROUP], tl.float32), tl.zeros([GROUP], tl.float32)
    value = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in range(program, last + 1, SPLITS_PER_BLOCK):
        # [stretches, query heads], and with d behind them.
        source = start + tl.arange(0, SPLITS_PER_BLOCK)
        valid = (source <= last)[:, None] & (group < G)[None, :]
        slot = source * 2 + (source == program).to(tl.int32)
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
    token = tl.load(query_start + row).to(tl.int64)
    result = (value / mass[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token * H * G + head * G + group)[:, None] * D + dim[None, :], result, mask=asked)


_launch = Launcher(_join)


def join_stretches(plan: DecodePlan, batch: Batch, layer: int, out: torch.Tensor) -> None:
    """Write the output of every item that more than one program has worked on.

    Args:
        plan: for the batch. Its scratch holds what the programs have summed up (:attr:`.plan.DecodePlan.partials`).
        batch: the step's requests.
        layer: index of the layer on this worker.
        out: [T, H, G, d], contiguous, written.
    """
    groups, dim = plan.partials.shape[2], out.shape[-1]
    _launch(
        (plan.programs, 1, 1),
        (out, plan.open_item, plan.partials),
        (batch.query_start, plan.item_start[layer], batch.num_rows * plan.heads),
        (),
        (dim, triton.next_power_of_2(dim), plan.heads, groups, triton.next_power_of_2(groups), SPLITS_PER_BLOCK),
        num_warps=min(4, triton.next_power_of_2(groups)),
    )
