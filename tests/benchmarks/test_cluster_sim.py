"""The simulation of many engines, on cases that can be worked out by hand."""

from __future__ import annotations

import pytest

from benchmarks.capacity import live_share
from benchmarks.cluster_sim import Engine, Request, offline, simulate

SECOND = Engine(cost=(1.0, 0.0, 0.0, 0.0), blocks=10**6, rows=2, budget=100, pruned=False)


def test_chunks_rows_and_budget() -> None:
    """Steps of a second. A prompt of 150 takes two steps of 100 tokens; running rows take their token first."""
    requests = offline(3, prompt=150, answer=2)
    (engine,) = simulate(SECOND, 1, requests)
    assert [one.first_token for one in requests] == [2.0, 4.0, 5.0]
    assert [one.end for one in requests] == [3.0, 5.0, 6.0]
    assert engine.peak == 2


def test_arrivals_go_to_the_emptiest_engine() -> None:
    requests = [Request(0.0, 50, 3), Request(0.0, 50, 3), Request(10.0, 50, 1)]
    engines = simulate(SECOND, 2, requests)
    assert [one.peak for one in engines] == [1, 1]
    assert [one.end for one in requests] == [3.0, 3.0, 11.0]


def test_memory_limits_how_many_run() -> None:
    """Three blocks: one request of two blocks at a time."""
    small = Engine(cost=(1.0, 0.0, 0.0, 0.0), blocks=3, rows=8, budget=1000, pruned=False)
    requests = offline(2, prompt=128, answer=1)
    simulate(small, 1, requests)
    assert [one.end for one in requests] == [1.0, 2.0]


def test_every_cost_counts() -> None:
    engine = Engine(cost=(1.0, 0.01, 0.1, 0.001), blocks=100, rows=8, budget=1000, pruned=False)
    requests = offline(1, prompt=640, answer=2)
    simulate(engine, 1, requests)
    # Reading: 640 tokens, a row, ten blocks; then a row, whose 641st token opens an eleventh block.
    assert requests[0].first_token == pytest.approx(1 + 6.4 + 0.1 + 0.010)
    assert requests[0].end - requests[0].first_token == pytest.approx(1 + 0.1 + 0.011)


def test_longer_requests_keep_a_smaller_share() -> None:
    shares = [live_share(tokens) for tokens in (64, 1024, 16_384, 131_072)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0 and shares[-1] < 0.1
