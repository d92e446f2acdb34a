"""NaN in free pages, for debugging: whoever reads a page that it does not hold then computes NaN."""

from __future__ import annotations

import numpy as np
import torch

POISON = 0xFF
"""The byte of which NaN consists in float8 (e4m3), float16, bfloat16 and float32. As an integer it is -1."""


class Poison:
    """Fills pages of one worker with NaN.

    Args:
        pool: the whole cache as bytes.
        page_bytes: bytes of a page of one stream.
        padding: pages at the beginning of the cache that are no request's.
    """

    def __init__(self, pool: torch.Tensor, page_bytes: int, padding: int) -> None:
        self._pages = pool[: len(pool) // page_bytes * page_bytes].view(-1, page_bytes)
        self._pages[padding:] = POISON

    def fill(self, ids: np.ndarray) -> None:
        """Fill pages [n] that were freed, on the compute stream: steps under way have read them before."""
        if ids.size:
            self._pages[torch.from_numpy(ids).to(self._pages.device, torch.int64)] = POISON
