"""Write a step's changes into the page table."""

from __future__ import annotations

import torch

from ..dispatch import use_triton
from ..paged import PageTable
from . import reference


def table_update(table: PageTable, *args: torch.Tensor) -> None:
    """:func:`.reference.table_update`, by the implementation for the table's device."""
    if use_triton(table.entries.device):
        from . import kernel

        kernel.table_update(table, *args)
    else:
        reference.table_update(table, *args)


__all__ = ["table_update"]
