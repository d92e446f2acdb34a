"""Token shift, QK-norm, rotation, forget gate and the page write in plain PyTorch."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from ...float8 import FP8_MAX, power_of_two_above
from ...paged import Batch, PageTable
from ...rope import rotate
from ...segments import sums_since
from ..pages import GATE_FLOOR, ForgettingPages


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
    """Write T new tokens into their pages: ``k'_t = a_t k_{t-1} + (1 - a_t) k_t`` (the same for v), then RMS
    norm and rotation of k', and the in-page running sums of log f (FoX, arXiv 2503.02130).

    The new tokens may stand where an earlier step has written others, up to ``L - 1`` tokens back (``pages.last``
    has L): drafts that were rejected. What the page keeps of those is then written over, but a float8 page's
    scale stays as large as they have made it.

    Args:
        pages: the page pool, written.
        table: the page table, in which the new tokens' pages are already.
        batch: the step's requests.
        layer: index of the layer on this worker; its streams are ``[layer * H, (layer + 1) * H)``.
        k, v: [T, H, d] in the model's dtype, as projected.
        gate: [T, H, G] logits of the forget gate, of any floating dtype: log f = logsigmoid(gate).
        shift_k, shift_v: [T, H] logits of the token shift, of any floating dtype: a = sigmoid(shift); None without
            that shift.
        k_norm: [H, d] RMS-norm weight, of any floating dtype, or None.
        norm_eps: of that norm.
        rope_base: theta, or None without rotation.
    """
    size, heads, device = pages.page_size, k.shape[1], k.device
    streams = torch.arange(layer * heads, (layer + 1) * heads, device=device)
    row, pos, first_pos = batch.row_of, batch.position, batch.first_position
    offset = pos % size
    ids = table.page_ids(batch.slots[row][:, None], (pos // size)[:, None], streams)
    before = (first_pos - 1).clamp(min=0)
    ids_before = table.page_ids(batch.slots[:, None], (before // size)[:, None], streams)
    kept = 1 if pages.last is None else pages.last.shape[1]
    token, row_start = torch.arange(batch.num_tokens, device=device), batch.query_start.long()[row]
    several = batch.work is not None  # else every token is the first of its row

    # What the partly filled page of each row's first token holds already.
    carry = pages.gates[ids_before, :, (before % size)[:, None]]
    carry = carry.masked_fill((first_pos % size == 0)[:, None, None], 0.0)[row]
    # Double precision: a difference of long running sums must not lose what one page adds.
    in_page = logsigmoid(gate.float()).clamp(min=GATE_FLOOR).double()
    if several:
        page_start = torch.maximum(token - offset, row_start)
        in_page = sums_since(in_page, page_start)[1:]
        carry = carry.masked_fill((page_start != row_start)[:, None, None], 0.0)
    pages.gates[ids, :, offset[:, None]] = (in_page + carry).float()

    stored = None
    if pages.last is not None:
        stored = pages.last[ids_before, (before % size % kept)[:, None]]
        stored = stored.masked_fill((first_pos == 0)[:, None, None, None], 0.0)[row]

    def shifted(x: torch.Tensor, shift: torch.Tensor | None, which: int) -> torch.Tensor:
        if shift is None:
            return x
        assert stored is not None
        previous = stored[:, :, which]
        if several:
            previous = torch.where((token == row_start)[:, None, None], previous, x.roll(1, 0))
        a = shift.float().sigmoid()[..., None]
        return (a * previous + (1.0 - a) * x).to(x.dtype)

    new_k, new_v = shifted(k, shift_k, 0), shifted(v, shift_v, 1)
    if k_norm is not None:
        wide = new_k.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        new_k = (wide * inverse * k_norm.float()).to(k.dtype)
    if rope_base is not None:
        new_k = rotate(new_k, pos, rope_base)
    if pages.scales is None:
        pages.k[ids, offset[:, None]] = new_k
        pages.v[ids, offset[:, None]] = new_v
    else:
        begins = pos == first_pos[row]
        has_content = begins & (offset > 0)
        opens = begins | (offset == 0)
        _write_scaled(pages.k, pages.scales[:, 0], ids, offset, opens, has_content, new_k)
        _write_scaled(pages.v, pages.scales[:, 1], ids, offset, opens, has_content, new_v)
    if pages.last is not None:
        raw = torch.stack((k, v), dim=2).to(pages.last.dtype)
        if several:
            to_end = torch.minimum(size - 1 - offset, batch.seq_lens[row] - 1 - pos)
            newest = (to_end < kept).nonzero().squeeze(-1)
            ids, offset, raw = ids[newest], offset[newest], raw[newest]
        pages.last[ids, (offset % kept)[:, None]] = raw


def _write_scaled(
    stored: torch.Tensor,
    scales: torch.Tensor,
    ids: torch.Tensor,
    offset: torch.Tensor,
    opens: torch.Tensor,
    has_content: torch.Tensor,
    new: torch.Tensor,
) -> None:
    """Write ``new`` [T, H, d] as float8 with one power-of-two scale a page.

    A page's scale only grows; what the page holds already is then brought to the new scale, which is exact except
    for numbers that become subnormal.

    Args:
        stored: [P, N, d] float8; scales: [P] float32.
        ids: [T, H] page of each token; offset: [T] its place there.
        opens: [T] whether the token is the step's first in its page; has_content: [T] and the page is not empty.
    """
    group = opens.cumsum(0) - 1
    first = opens.nonzero().squeeze(-1)
    peak = new.float().abs().amax(-1)
    largest = torch.zeros(len(first), new.shape[1], device=new.device)
    largest = largest.scatter_reduce(0, group[:, None].expand_as(peak), peak, "amax")
    scale = power_of_two_above(largest / FP8_MAX)
    page = ids[first]
    old = torch.where(has_content[first][:, None], scales[page], 0.0)
    scale = torch.maximum(scale, old)
    raw = stored.view(torch.uint8)
    grown = (old > 0) & (scale > old)
    at = page[grown]
    content = raw[at].view(stored.dtype).float() * (old / scale)[grown][:, None, None]
    raw[at] = content.to(stored.dtype).view(torch.uint8)
    scales[page] = scale
    values = (new.float() / scale[group][..., None]).to(stored.dtype)
    raw[ids, offset[:, None]] = values.view(torch.uint8)
