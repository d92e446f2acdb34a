"""The free ids of one rank."""

from __future__ import annotations

import numpy as np


class FreeIds:
    """A stack of ids that nobody has. Low ids are on top at first, so those in use are dense under a light load.

    Args:
        first: the lowest id.
        count: how many ids there are.

    Attributes:
        left: how many ids are on the stack. It is a plain number, because requests ask for pages thousands of times
            a second.
    """

    def __init__(self, first: int, count: int) -> None:
        self._stack = np.arange(first + count - 1, first - 1, -1, dtype=np.int32)
        self.left = count

    def pop(self, count: int) -> np.ndarray:
        """Take ids [count] int32, of which there must be as many. The array is valid until ids are pushed."""
        self.left -= count
        return self._stack[self.left : self.left + count]

    def push(self, ids: np.ndarray) -> None:
        """Put ids [n] back."""
        self._stack[self.left : self.left + len(ids)] = ids
        self.left += len(ids)

    def all(self) -> np.ndarray:
        """Return the ids that are on the stack (for checks and tests)."""
        return self._stack[: self.left]
