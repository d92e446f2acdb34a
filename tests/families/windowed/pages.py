"""What a page of a windowed head looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowedPageFormat:
    """Bytes of one page: ``[K | V]``.

    Args:
        page_size: tokens per page.
        head_dim: d.
        dtype: the model's.
    """

    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return 2 * self.page_size * self.head_dim * self.dtype.itemsize

    def view(self, pool: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut a flat pool of bytes [P * page_bytes] into K and V: [P, page_size, d] each."""
        both = pool.view(self.dtype).view(-1, 2, self.page_size, self.head_dim)
        return both[:, 0], both[:, 1]
