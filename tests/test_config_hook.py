"""Which steps are captured as CUDA graphs."""

from __future__ import annotations

import itertools

import pytest

from vllm_fox.config_hook import captured_sizes, waits_for_host


@pytest.mark.parametrize("hidden_size, tokens", [(1024, 19712), (1536, 8704), (2048, 4864), (4096, 1024)])
def test_small_models_wait_for_the_host_longer(hidden_size: int, tokens: int) -> None:
    assert waits_for_host(hidden_size) == tokens


@pytest.mark.parametrize("most", [1, 100, 1000, 1024, 1100, 2048, 8192, 16384])
def test_captured_sizes(most: int) -> None:
    """They end with the largest, are few, and a step is not padded by much."""
    sizes = captured_sizes(most)
    assert sizes[-1] == most and sizes == sorted(set(sizes)) and len(sizes) < 120
    assert all(after <= 1.25 * before for before, after in itertools.pairwise(sizes) if before >= 1024)
