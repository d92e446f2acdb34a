"""What attention over live tokens keeps from step to step."""

from __future__ import annotations

import torch


class SeenTokens:
    """Room for the lists of tokens that rows with one query see. A CUDA graph holds its address.

    Args:
        max_rows: most rows that a step can have.
        streams: S, of a layer.
        max_model_len: longest request.
        device: of the pages.

    Attributes:
        places: [max_rows, S, max_model_len] int32: places of the tokens, as page * page size + offset.
        counts: [max_rows, S] int32: how many they are.
    """

    def __init__(self, max_rows: int, streams: int, max_model_len: int, device: torch.device) -> None:
        self.places = torch.empty(max_rows, streams, max_model_len, dtype=torch.int32, device=device)
        self.counts = torch.empty(max_rows, streams, dtype=torch.int32, device=device)
