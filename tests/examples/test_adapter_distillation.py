"""The loss by which adapters learn to evict."""

from __future__ import annotations

from typing import Any

import adapter_distillation
import pytest
import torch

from vllm_fox.hf import EvictingDecoderConfig, EvictingDecoderForCausalLM


def test_a_missed_share_costs_its_square_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers evict 60 and 80 % of 90 %; more than was asked for costs nothing."""
    model: Any = torch.nn.Identity()
    found = torch.tensor(0.5), torch.tensor([0.6, 0.8]), torch.zeros(2)
    monkeypatch.setattr(adapter_distillation, "divergence", lambda *_: found)
    learner = adapter_distillation.Distillation(model, budget=2.0)
    assert learner(torch.zeros(1, 4), torch.tensor(0.9)).item() == pytest.approx(0.5 + 2 * (0.2 + 200 * 0.04))
    assert learner(torch.zeros(1, 4), torch.tensor(0.65)).item() == pytest.approx(0.5)


@pytest.mark.parametrize("sure", [-60.0, 60.0])
def test_decisions_that_are_too_sure_are_pulled_back(sure: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise turns none of them round, so nothing else has a gradient."""
    torch.manual_seed(0)
    eviction = {"method": "dms_adapter", "window": 4, "shift": 1, "scale": 100.0, "offset": -sure}
    config = EvictingDecoderConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, eviction=eviction,
    )  # fmt: skip
    model = EvictingDecoderForCausalLM(config).double().train()
    learner = adapter_distillation.Distillation(model, budget=1.0)
    ids = torch.randint(32, (1, 24))
    adapters = [layer.self_attn.dms_proj_alpha.weight for layer in model.model.layers]
    learner(ids, torch.tensor(0.5)).backward()
    for adapter in adapters:
        assert adapter.grad is not None and adapter.grad.abs().max() > 0
        adapter.data -= 1e-3 * adapter.grad
    assert (model.decisions(ids)[..., :-1].abs().mean((1, 2, 3)) < 60).all()
    monkeypatch.setattr(adapter_distillation, "CLEARNESS", 0.0)
    model.zero_grad()
    for adapter in adapters:
        adapter.data.zero_()
    learner(ids, torch.tensor(0.5)).backward()
    assert all(adapter.grad is not None and adapter.grad.abs().max() < 1e-9 for adapter in adapters)


def test_the_divergence_is_the_formulas_with_its_gradient() -> None:
    """Of hidden states that do not fill the last part."""
    torch.manual_seed(1)
    n = adapter_distillation.TOKENS_AT_ONCE + 5
    head, teacher = torch.randn(37, 8), torch.randn(n, 8)
    student = torch.randn(n, 8, requires_grad=True)
    found = adapter_distillation._Divergence.apply(head, teacher, student, adapter_distillation.compare)
    (3 * found).backward()
    assert student.grad is not None
    wide = student.detach().double().requires_grad_()
    theirs, ours = ((x @ head.double().T).log_softmax(-1) for x in (teacher.double(), wide))
    want = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    (gradient,) = torch.autograd.grad(3 * want, wide)
    assert found.item() == pytest.approx(want.item(), rel=1e-5)
    # A row's gradient is a sum over 37 entries, each of which is a difference of probabilities, rounded to 2**-24.
    off = 3 * 2**-24 * 37 * head.abs().max() * 8
    assert (student.grad - gradient).abs().max() < off
