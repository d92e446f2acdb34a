"""How many pages a request will need at its peak, learned from what requests before it gave back."""

from __future__ import annotations

import numpy as np

SMOOTHING = 0.2
"""Weight of a new observation in the running mean of a bucket."""


def _bucket(num_pages: np.ndarray | int) -> np.ndarray:
    """floor(log2) of a count of at least 1."""
    return np.frexp(num_pages)[1] - 1


class LiveShare:
    """Running estimate of live pages over allocated pages, by request length.

    Lengths fall into buckets of powers of two pages. Heads that forget keep a window and heads that remember keep
    everything, so the share falls with length: what shorter requests showed is a safe bound for longer ones, and
    nothing is known for requests shorter than all that were seen (they count as if they never forgot).
    """

    def __init__(self) -> None:
        self._share = np.ones(64)
        self._seen = np.zeros(64, dtype=bool)

    def observe(self, num_pages: np.ndarray, live_share: np.ndarray) -> None:
        """Learn from requests that have ``num_pages`` pages a stream, of which ``live_share`` [0, 1] are live."""
        # The most memorious request of a bucket decides: admitting too much costs a preemption, too little a wait.
        worst = np.zeros_like(self._share)
        bucket = _bucket(num_pages)
        np.maximum.at(worst, bucket, live_share)
        # Rises at once, falls slowly.
        slow = (1 - SMOOTHING) * self._share + SMOOTHING * worst
        new = np.where(self._seen, np.maximum(worst, slow), worst)
        self._share[bucket] = new[bucket]
        self._seen[bucket] = True

    def share(self, num_pages: int) -> float:
        """Expected live share of a request of ``num_pages`` pages a stream; 1 when nothing is known."""
        known = np.flatnonzero(self._seen[: int(_bucket(num_pages)) + 1])
        return float(self._share[known[-1]]) if known.size else 1.0

    def peak(self, num_pages: int, chunk_pages: int) -> int:
        """Pages a stream that a prompt of ``num_pages`` holds at most, when it is computed in chunks.

        While a chunk is computed, all its pages are held besides the live ones before it.
        """
        return min(num_pages, int(np.ceil(self.share(num_pages) * num_pages)) + chunk_pages)
