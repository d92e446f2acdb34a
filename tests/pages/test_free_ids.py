"""A stack of free ids."""

from __future__ import annotations

import numpy as np

from vllm_fox.pages.free_ids import FreeIds


def test_low_ids_go_first_and_those_that_come_back_go_again() -> None:
    free = FreeIds(first=3, count=7)
    taken = free.pop(2).copy()
    assert sorted(taken.tolist()) == [3, 4] and free.left == 5
    assert sorted(free.all().tolist()) == [5, 6, 7, 8, 9]
    free.push(np.array([4], dtype=np.int32))
    assert free.pop(1).tolist() == [4] and sorted(free.pop(5).tolist()) == [5, 6, 7, 8, 9] and free.left == 0
