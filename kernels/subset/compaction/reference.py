"""Live tokens of the oldest pages into the places of dropped ones, in plain PyTorch."""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable
from ..pages import SubsetPages, places, rows_of


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
    size, streams = pages.page_size, table.first_live.shape[1]
    fields = [pages.k.view(torch.uint8), pages.v.view(torch.uint8), pages.int_k, pages.begin, pages.end]
    if pages.scales is not None:
        fields.append(pages.scales)
    for row, tokens, length in rows_of(batch):
        slot, new = batch.slots[row], tokens.stop - tokens.start
        length = max(length - unsettled, 0)
        if int(slot) == 0 or length // period == max(length - new, 0) // period:
            continue
        for stream in range(streams):
            at = places(pages, table, slot, length, stream)
            page, offset = at.clamp(min=0) // size, at.clamp(min=0) % size
            dropped = (at >= 0) & (pages.end[page, offset] <= length)
            live = (at >= 0) & ~dropped
            # Of the first n pages: their live tokens, and the places for them in all later pages.
            moving = live.sum(1).cumsum(0)
            room = dropped.sum() - dropped.sum(1).cumsum(0)
            emptied = int((moving <= room)[:-1].sum())
            if not emptied:
                continue
            source = at[:emptied][live[:emptied]]
            target = at[emptied:][dropped[emptied:]][: len(source)]
            for field in fields:
                field[target // size, target % size] = field[source // size, source % size]
            newest = (length - 1) // size
            table.first_live[slot, stream] = newest + 1 - len(at) + emptied
