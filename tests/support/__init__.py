"""What several tests share: checkpoints, formulas, bounds, and how long to wait."""

import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
"""Of the checkout."""

COUNTED, COUNTED_S = 3_000_000, 0.2
"""Numbers that Python adds up, and the seconds that it takes a quiet machine of moderate speed."""
ROOM = 5
"""How many times as slow a machine may become after its speed was measured."""


def patience(seconds: float) -> float:
    """How long to wait here for what may take a quiet machine so many seconds, going by how fast it is just now.

    A machine that is slow, or busy with something else, is no failure of what is waited for. It may also be quiet
    while it is measured and busy a moment later, so there is always room.
    """
    begun = time.perf_counter()
    sum(range(COUNTED))
    for number in range(COUNTED):
        number += 1
    return ROOM * seconds * max(1.0, (time.perf_counter() - begun) / COUNTED_S)
