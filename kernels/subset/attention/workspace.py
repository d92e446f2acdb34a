"""Lists of the tokens that are seen."""

from __future__ import annotations

import torch

from ...paged import Batch, PageTable


class SeenTokens:
    """Room for the lists of tokens that tiles of queries see.

    Args:
        tiles: that have their lists at the same time.
        streams: S, of a layer.
        longest: most tokens of a list.
        device: of the pages.

    Attributes:
        places: [tiles, S, longest] int32: places of the tokens, as page * page size + offset. Those of tokens that
            all queries of the tile see stand at the front, the others at the end.
        counts: [tiles, S, 2] int32: how many stand at the front and at the end.
    """

    def __init__(self, tiles: int, streams: int, longest: int, device: torch.device) -> None:
        self.places = torch.empty(tiles, streams, longest, dtype=torch.int32, device=device)
        self.counts = torch.empty(tiles, streams, 2, dtype=torch.int32, device=device)

    def update(self, table: PageTable, batch: Batch) -> None:
        """Prepare nothing: every layer makes its own lists."""
