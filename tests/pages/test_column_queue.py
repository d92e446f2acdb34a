"""The queue of columns, against an ordered dictionary."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_fox.pages.column_queue import ColumnQueue

COLUMNS = 6


@given(st.lists(st.lists(st.integers(1, COLUMNS - 1), max_size=8) | st.integers(1, COLUMNS)))
def test_queue_is_an_ordered_dictionary(steps: list[list[int] | int]) -> None:
    """A list is put in, a number says how many are taken out. The queue does not grow with what went through it."""
    queue, expected = ColumnQueue(COLUMNS), dict[int, None]()
    for step in steps:
        if isinstance(step, list):
            queue.put(np.array(step, dtype=np.int64))
            for column in step:
                expected.pop(column, None)
                expected[column] = None
        else:
            front = list(expected)[:step]
            assert queue.take(step).tolist() == front
            for column in front:
                del expected[column]
        assert [column for column in range(COLUMNS) if column in queue] == sorted(expected)
        assert sum(len(columns) for _, columns in queue._parts) <= 2 * COLUMNS
    assert queue.take(COLUMNS).tolist() == list(expected)
