"""Token shift, QK-norm, rotation and the page write in plain PyTorch."""

from __future__ import annotations

import torch

from ..paged import Batch, Pages, PageTable

GATE_FLOOR = -1024.0
"""Smallest log f that is stored. Below it every weight across the gate is zero in float32 anyhow, and a larger
number would cost the running sums behind it their precision."""


def rotate(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary position embedding over the whole head, rotating halves (not neighbouring pairs).

    Args:
        x: [T, H, d].
        positions: [T], any integer dtype.
        base: the theta of RoPE.

    Returns:
        [T, H, d] in the dtype of ``x``; computed in float32 (float64 for float64 input).
    """
    work = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = (positions.to(torch.float32)[:, None] * frequency).to(work)[:, None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(work).split(half, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def cache_write(
    pages: Pages,
    table: PageTable,
    batch: Batch,
    streams: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_f: torch.Tensor,
    shift_k: torch.Tensor | None,
    shift_v: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    norm_eps: float,
    rope_base: float | None,
) -> None:
    """Write T new tokens into their pages: ``k'_t = a_t k_{t-1} + (1 - a_t) k_t`` (the same for v), then RMS
    norm and rotation of k', and the in-page running sums of log f (FoX, arXiv 2503.02130).

    Args:
        pages, table, batch: see :mod:`kernels.paged`; pages of the new tokens are in the table already.
        streams: [H] int64, the layer's streams in the table.
        k, v: [T, H, d] as projected.
        log_f: [T, H, G] float32, at most 0.
        shift_k, shift_v: [T, H] float32 in [0, 1], or None without that shift.
        k_norm: [H, d] RMS-norm weight, or None.
        norm_eps: of that norm.
        rope_base: theta, or None without rotation.
    """
    size = pages.page_size
    device = k.device
    lens = batch.query_start.diff()
    row = torch.repeat_interleave(torch.arange(batch.num_rows, device=device), lens)
    row_start = batch.query_start[row]
    token = torch.arange(batch.num_tokens, device=device)
    first_pos = batch.seq_lens - lens
    pos = first_pos[row] + token - row_start
    page, offset = pos // size, pos % size
    ids = table.page_ids(batch.slots[row][:, None], page[:, None], streams)

    before = (first_pos - 1).clamp(min=0)
    ids_before = table.page_ids(batch.slots[:, None], (before // size)[:, None], streams)
    at_row_start = token == row_start

    # What the partly filled page of each row's first token holds already.
    carry = pages.gates[ids_before, :, (before % size)[:, None]]
    carry = torch.where((first_pos % size != 0)[:, None, None], carry, 0.0)
    # Double precision: a difference of long running sums must not lose what one page adds.
    running = torch.nn.functional.pad(log_f.clamp(min=GATE_FLOOR).double().cumsum(0), (0, 0, 0, 0, 1, 0))
    page_start = torch.maximum(token - offset, row_start)
    in_page = running[1:] - running[page_start]
    in_page = in_page + torch.where((page_start == row_start)[:, None, None], carry[row], 0.0)
    pages.gates[ids, :, offset[:, None]] = in_page.float()

    def shifted(x: torch.Tensor, alpha: torch.Tensor | None, which: int) -> torch.Tensor:
        if alpha is None:
            return x
        assert pages.last is not None
        stored = pages.last[ids_before][:, :, which]
        stored = torch.where((first_pos > 0)[:, None, None], stored, 0.0)
        previous = torch.where(at_row_start[:, None, None], stored[row], x.roll(1, 0))
        a = alpha[..., None]
        return (a * previous + (1.0 - a) * x).to(x.dtype)

    new_k, new_v = shifted(k, shift_k, 0), shifted(v, shift_v, 1)
    if k_norm is not None:
        wide = new_k.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_eps)
        new_k = (wide * inverse * k_norm.float()).to(k.dtype)
    if rope_base is not None:
        new_k = rotate(new_k, pos, rope_base)
    pages.k[ids, offset[:, None]] = new_k.to(pages.k.dtype)
    pages.v[ids, offset[:, None]] = new_v.to(pages.v.dtype)
    if pages.last is not None:
        ends = ((offset == size - 1) | (token + 1 == row_start + lens[row])).nonzero().squeeze(-1)
        pages.last[ids[ends]] = torch.stack((k[ends], v[ends]), dim=2).to(pages.last.dtype)
