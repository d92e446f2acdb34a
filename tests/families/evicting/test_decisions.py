"""Decisions at their thresholds."""

from __future__ import annotations

import pytest
import torch

from vllm_fox.families.evicting.decisions import ScorePredictor
from vllm_fox.modules.heads import HeadShare


def predictor(scores: list[float], threshold: float) -> ScorePredictor:
    """One that gives every token the same scores."""
    made = ScorePredictor(4, HeadShare(len(scores), list(range(len(scores)))), None, threshold)
    weight, bias = made.kvzap.parameters()
    weight.data.zero_()
    bias.data.copy_(torch.tensor(scores))
    return made


@pytest.mark.parametrize(
    "dtype, threshold, scores, evicted",
    [
        (torch.float32, -4.0, [-4.0, -4.0001, -3.9999], [False, True, False]),
        # -4.3 rounds to -4.3125 in bfloat16, and scores have that number's neighbours: as kvpress compares them.
        (torch.bfloat16, -4.3, [-4.3125, -4.34375, -4.28125], [False, True, False]),
        (torch.float32, -4.3, [-4.3125, -4.3, -4.28125], [True, False, False]),
    ],
)
def test_a_score_that_equals_the_threshold_stays(
    dtype: torch.dtype, threshold: float, scores: list[float], evicted: list[bool]
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as vLLM does while it builds a model
    try:
        x = torch.ones(2, 4)
        assert predictor(scores, threshold)(x, x, x).tolist() == [evicted, evicted]
    finally:
        torch.set_default_dtype(before)
