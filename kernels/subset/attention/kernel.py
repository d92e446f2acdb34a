"""Attention over live tokens in Triton: which of the two ways a row takes.

Rows with one query over streams of one KV head read whole pages (:mod:`.decode_kernel`). For others, lists are made
of the tokens that they see (:mod:`.list_kernel`). The heads of a stream share a list, and so do the queries of a
block.
"""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable
from ...shares.plan import DecodePlan
from ..pages import SubsetPages
from .decode_kernel import decode_over_pages
from .list_kernel import attend_lists
from .workspace import SeenTokens

LIST_BYTES = 128 * 2**20
"""Lists of a prompt's tiles take at most so many bytes at once, or what one tile needs."""


def subset_attention(
    pages: SubsetPages,
    table: PageTable,
    batch: Batch,
    layer: int,
    q: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    workspace: DecodePlan | SeenTokens | None,
) -> None:
    """See :func:`.reference.subset_attention`. ``q`` is dense within a token, ``out`` contiguous."""
    if batch.has_decode and isinstance(workspace, DecodePlan):
        decode_over_pages(pages, table, batch, layer, q, scale, out, workspace)
    elif batch.has_decode:
        assert isinstance(workspace, SeenTokens)
        attend_lists(pages, table, batch, layer, q, scale, out, workspace, None)
    if batch.work is not None:
        streams, longest = q.shape[1], batch.work.max_pages * pages.page_size
        together = max(1, LIST_BYTES // (4 * streams * longest))
        lists = SeenTokens(min(together, len(batch.work.tiles)), streams, longest, pages.device)
        for tiles in batch.work.tiles.split(together):
            attend_lists(pages, table, batch, layer, q, scale, out, lists, tiles)
