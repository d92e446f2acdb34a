"""Columns of the prefix cache in the order in which they were last left."""

from __future__ import annotations

from collections import deque

import numpy as np


class ColumnQueue:
    """A queue of column numbers: a column that is put in again moves to the end.

    Whole arrays are put in and taken out. A number's earlier places stay in the queue until they are reached, and
    are passed over then.

    Args:
        num_columns: numbers are below this.
    """

    def __init__(self, num_columns: int) -> None:
        # The place of each column, 0 for those that are not in the queue.
        self._place = np.zeros(num_columns, dtype=np.int64)
        self._next = 1
        self._parts: deque[tuple[np.ndarray, np.ndarray]] = deque()  # places and columns
        self._length = 0

    def put(self, columns: np.ndarray) -> None:
        """Put columns [n] at the end, in this order. A number may be there several times."""
        if not columns.size:
            return
        places = np.arange(self._next, self._next + len(columns))
        self._next += len(columns)
        # Of several places of a number the last one is kept.
        self._place[columns] = places
        self._parts.append((places, columns))
        self._length += len(columns)
        if self._length > 2 * len(self._place):
            # At most one place of each number is current.
            self.put(self.take(self._length))

    def take(self, count: int) -> np.ndarray:
        """Take at most ``count`` columns from the front. None are returned only if the queue is empty."""
        taken, missing = [], count
        while missing > 0 and self._parts:
            places, columns = self._parts.popleft()
            self._length -= len(columns)
            current = self._place[columns] == places
            places, columns = places[current], columns[current]
            if len(columns) > missing:
                self._parts.appendleft((places[missing:], columns[missing:]))
                self._length += len(columns) - missing
                columns = columns[:missing]
            self._place[columns] = 0
            missing -= len(columns)
            taken.append(columns)
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def __contains__(self, column: int) -> bool:
        return bool(self._place[column])
