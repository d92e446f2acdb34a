"""Estimate how many pages a request will hold at its peak, from what earlier requests have released."""

from __future__ import annotations

import numpy as np

SMOOTHING = 0.2
"""Weight of a new observation in the running mean of a bucket."""


def _bucket(num_pages: np.ndarray | int) -> np.ndarray:
    """Return floor(log2(num_pages)); counts are at least 1."""
    return np.frexp(num_pages)[1] - 1


class LiveShare:
    """Running estimate of the live share (live pages over allocated pages) by request length.

    A bucket holds the lengths between two powers of two pages. Heads that forget keep a window and heads that
    remember keep everything, so the share falls with length. Hence the share of shorter requests is a safe bound
    for longer ones. Nothing is known about requests shorter than all that were seen, so their share counts as 1.
    """

    def __init__(self) -> None:
        self._share = np.ones(64)
        self._seen = np.zeros(64, dtype=bool)

    def observe(self, num_pages: np.ndarray, live_share: np.ndarray) -> None:
        """Learn from requests with ``num_pages`` pages per stream, of which the share ``live_share`` is live."""
        # The request that forgets least decides for its bucket: admitting too much costs a preemption, admitting
        # too little only a wait.
        worst = np.zeros_like(self._share)
        bucket = _bucket(num_pages)
        np.maximum.at(worst, bucket, live_share)
        # The estimate rises at once and falls slowly.
        slow = (1 - SMOOTHING) * self._share + SMOOTHING * worst
        new = np.where(self._seen, np.maximum(worst, slow), worst)
        self._share[bucket] = new[bucket]
        self._seen[bucket] = True

    def share(self, num_pages: int) -> float:
        """Return the expected live share of a request of ``num_pages`` pages per stream; 1 if nothing is known."""
        known = np.flatnonzero(self._seen[: int(_bucket(num_pages)) + 1])
        return float(self._share[known[-1]]) if known.size else 1.0

    def peak(self, num_pages: int, chunk_pages: int) -> int:
        """Return the most pages per stream that a prompt of ``num_pages`` holds while it is computed in chunks.

        While a chunk is computed, all its pages are held in addition to the live ones before it.
        """
        return min(num_pages, int(np.ceil(self.share(num_pages) * num_pages)) + chunk_pages)
