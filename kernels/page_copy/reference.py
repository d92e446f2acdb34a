"""Copies of pages in plain PyTorch."""

from __future__ import annotations

import torch


def page_copy(
    source_ids: torch.Tensor, target_ids: torch.Tensor, *, source: torch.Tensor, target: torch.Tensor
) -> None:
    """Copy n pages of one pool to places of another, in any order.

    Args:
        source_ids, target_ids: [n] int32 page ids in each, on the device. No target occurs twice.
        source: [P, w] pages of w 32-bit words, int32.
        target: [Q, w], written. One of the two pools may be pinned host memory.
    """
    target[target_ids] = source[source_ids]
