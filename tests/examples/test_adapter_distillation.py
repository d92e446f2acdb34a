"""The loss by which adapters learn to evict."""

from __future__ import annotations

from typing import Any

import adapter_distillation
import pytest
import torch


def test_a_missed_share_costs_its_square_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers evict 60 and 80 % of 90 %; more than was asked for costs nothing."""
    model: Any = torch.nn.Identity()
    found = torch.tensor(0.5), torch.tensor([0.6, 0.8])
    monkeypatch.setattr(adapter_distillation, "divergence", lambda *_: found)
    learner = adapter_distillation.Distillation(model, budget=2.0)
    assert learner(torch.zeros(1, 4), 0.9).item() == pytest.approx(0.5 + 2 * (0.2 + 200 * 0.04))
    assert learner(torch.zeros(1, 4), 0.65).item() == pytest.approx(0.5)
