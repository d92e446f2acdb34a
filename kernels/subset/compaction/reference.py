"""Live tokens of the oldest pages into the places of dropped ones, in plain PyTorch."""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable
from ..pages import HeldPages, SubsetPages, picked


def compact(pages: SubsetPages, table: PageTable, batch: Batch, period: int = 1, unsettled: int = 0) -> None:
    """Empty as many of the oldest pages of every stream as there are places for in newer ones.

    A token is dropped once the next query, which stands at the request's length, does not see it. Places of dropped
    tokens are refilled by tokens that keep their positions and their ends; places that no token has been written to
    are left for those to come. Afterwards there are fewer dropped tokens than fit into a page, so a request holds
    less than ``live tokens / page size + 2`` pages a stream. A page is emptied by at most as many moves as tokens
    were dropped for it, so a dropped token costs one move at most.

    Args:
        pages: the page pool after the step's last layer, written.
        table: the page table, of which ``first_live`` moves forward past the emptied pages.
        batch: the step's requests.
        period: a request waits until it has reached or passed a multiple of so many tokens, and may hold as many
            dropped ones more until then.
        unsettled: so many of a request's newest tokens may be rejected (speculative decoding). Pages are treated as
            if these were not written yet: a later step may write others to their places, and a rejected token drops
            nothing.
    """
    lengths = (batch.seq_lens.long() - unsettled).clamp(min=0)
    before = (lengths - batch.query_start.diff()).clamp(min=0)
    due = (batch.slots != 0) & (lengths // period != before // period)
    if not due.any():
        return
    slots, lengths, size = batch.slots[due].long(), lengths[due], pages.page_size
    streams = torch.arange(table.first_live.shape[1], device=table.device)
    held = HeldPages.of(table, size, slots, lengths, streams)
    dropped = held.written & (picked(pages.end, held.ids) <= lengths[:, None, None, None])
    live = held.written & ~dropped
    # Of the first n pages: their live tokens, and the places for them in all later pages.
    moving, passed = live.sum(-1).cumsum(-1), dropped.sum(-1).cumsum(-1)
    room = passed[..., -1:] - passed
    newest = (lengths[:, None] - 1) // size - held.first
    nth = torch.arange(held.ids.shape[-1], device=table.device)
    emptied = ((moving <= room) & (nth < newest[..., None])).sum(-1, keepdim=True)
    if not emptied.any():
        return
    leaves = (nth < emptied)[..., None]
    source = live & leaves
    target = dropped & ~leaves
    target &= target.flatten(2).cumsum(-1).view_as(target) <= source.sum((-2, -1))[..., None, None]
    # Both lists go from request to request, from stream to stream, and from the oldest place to the newest.
    every = held.ids[..., None] * size + torch.arange(size, device=table.device)
    source, target = every[source], every[target]
    fields = [pages.k.view(torch.uint8), pages.v.view(torch.uint8), pages.int_k, pages.begin, pages.end]
    if pages.scales is not None:
        fields.append(pages.scales)
    for field in fields:
        field[target // size, target % size] = field[source // size, source % size]
    # A request may have had more settled tokens before, and its first live page may stand behind those of now.
    at = slots[:, None], streams
    table.first_live[at] = torch.maximum(table.first_live[at], (held.first + emptied.squeeze(-1)).int())
