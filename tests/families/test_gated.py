"""A gated MLP whose backward pass is one kernel in compiled training steps: its gradients, and where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.checkpoints import make_config
from vllm_fox.families.fox.architecture import Architecture
from vllm_fox.hf import compile_layers
from vllm_fox.hf.fox.modeling import (
    FlaForgettingTransformerForCausalLM,
    ForgettingTransformerForCausalLM,
    GatedMLP,
)
from vllm_fox.kernels.gated_mlp import reference

ROWS = 7


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations that the backward pass was called with."""
    seen, own = list[str](), reference.product_backward

    def noted(grad: torch.Tensor, gate_up: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(activation)
        return own(grad, gate_up, activation)

    monkeypatch.setattr(reference, "product_backward", noted)
    return seen


def make_mlp(dialect: str = "official", inner: int = 48, **fields: Any) -> GatedMLP:
    torch.manual_seed(0)
    config = make_config(dialect, hidden_size=64, num_heads=2, intermediate_size=inner, **fields)
    return GatedMLP(Architecture.from_config(config)).double().train()


def compiled(module: nn.Module, backend: str = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend=backend)


def results(call: Any, mlp: GatedMLP, shape: tuple[int, ...] = (ROWS,), of_input: bool = True) -> dict[str, Any]:
    """The output, and the gradients of the input and of the weights that are trained."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, 64, generator=draw, dtype=torch.float64).requires_grad_(of_input)
    mlp.zero_grad()
    out = call(x)
    (out * torch.randn(out.shape, generator=draw, dtype=out.dtype)).sum().backward()
    grads = {name: weight.grad for name, weight in mlp.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **{name: grad for name, grad in grads.items() if grad is not None}}


def assert_same(found: dict[str, Any], want: dict[str, Any]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def unchanged(mlp: GatedMLP) -> None:
    pass


def hook_of_gate(mlp: GatedMLP) -> None:
    mlp.gate_proj.register_forward_hook(lambda layer, given, y: 2 * y)


def bias_of_gate(mlp: GatedMLP) -> None:
    mlp.gate_proj.bias = nn.Parameter(torch.randn(len(mlp.gate_proj.weight), dtype=torch.float64))


def frozen_gate(mlp: GatedMLP) -> None:
    mlp.gate_proj.requires_grad_(False)


def frozen(mlp: GatedMLP) -> None:
    mlp.down_proj.requires_grad_(False)


def hook(mlp: GatedMLP) -> None:
    mlp.down_proj.register_forward_hook(lambda layer, given, y: 2 * y)


def hook_before(mlp: GatedMLP) -> None:
    mlp.down_proj.register_forward_pre_hook(lambda layer, given: (given[0] + 1,))


def bias(mlp: GatedMLP) -> None:
    mlp.down_proj.bias = nn.Parameter(torch.randn(64, dtype=torch.float64))


def adapter(mlp: GatedMLP) -> None:
    peft = pytest.importorskip("peft", reason="PEFT, of the extra train, is not installed")
    config = peft.LoraConfig(target_modules=["down_proj"], r=2, init_lora_weights=False)
    peft.inject_adapter_in_model(config, mlp)
    mlp.double()


def sharded(mlp: GatedMLP) -> None:
    """Its weight is of another type, as those of layers that are sharded by themselves are."""

    class Weight(nn.Parameter):
        pass

    mlp.down_proj.weight = Weight(mlp.down_proj.weight.detach())


CASES: list[tuple[Callable[[GatedMLP], None], str, bool]] = [
    (unchanged, "official", True), (unchanged, "fla", True),
    (hook_of_gate, "official", True), (hook_of_gate, "fla", False),
    (bias_of_gate, "official", True), (bias_of_gate, "fla", False),
    (frozen_gate, "official", True), (frozen_gate, "fla", False),
    *((change, dialect, False)
      for change in (frozen, hook, hook_before, bias, adapter, sharded) for dialect in ("official", "fla")),
]  # fmt: skip


@pytest.mark.parametrize(("change", "dialect", "expected"), CASES)
def test_gradients_are_those_of_plain_layers(
    change: Callable[[GatedMLP], None], dialect: str, expected: bool, calls: list[str]
) -> None:
    """Where a layer has to be called, it is, and there is no kernel."""
    mlp = make_mlp(dialect)
    change(mlp)
    want = results(mlp, mlp)
    assert not calls
    assert_same(results(compiled(mlp), mlp), want)
    assert calls == (["silu"] if expected else [])


@pytest.mark.parametrize("dialect", ["official", "fla"])
@pytest.mark.parametrize("shape", [(0,), (1,), (2, 3)], ids=str)
@pytest.mark.parametrize("inner", [48, 50])
def test_sizes(inner: int, shape: tuple[int, ...], dialect: str, calls: list[str]) -> None:
    """A joint matrix of 100 rows is padded."""
    mlp = make_mlp(dialect, inner)
    assert_same(results(compiled(mlp), mlp, shape), results(mlp, mlp, shape))
    assert len(calls) == 1


def test_the_other_activation(calls: list[str]) -> None:
    mlp = make_mlp(hidden_act="sigmoid")
    assert_same(results(compiled(mlp), mlp), results(mlp, mlp))
    assert calls == ["sigmoid"]


def test_an_input_without_gradients(calls: list[str]) -> None:
    """If neither it nor the first layer has any, there is nothing of which the kernel's results would be."""
    mlp = make_mlp()
    assert_same(results(compiled(mlp), mlp, of_input=False), results(mlp, mlp, of_input=False))
    assert len(calls) == 1
    frozen_gate(mlp)
    assert_same(results(compiled(mlp), mlp, of_input=False), results(mlp, mlp, of_input=False))
    assert len(calls) == 1


def test_a_hook_that_comes_later_is_called(calls: list[str]) -> None:
    mlp = make_mlp()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):  # as layers that are fused set it
        call = compiled(mlp)
        results(call, mlp)
        hook(mlp)
        assert_same(results(call, mlp), results(mlp, mlp))
    assert len(calls) == 1


def test_nothing_changes_outside_of_training(calls: list[str]) -> None:
    mlp = make_mlp()
    results(compiled(mlp.eval()), mlp)
    with torch.no_grad():
        compiled(mlp.train())(torch.ones(ROWS, 64, dtype=torch.float64))
    assert not calls


def test_the_product_is_not_kept() -> None:
    torch._dynamo.reset()
    mlp, kept = make_mlp(), list[torch.Size]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        torch.compile(mlp)(torch.ones(ROWS, 64, dtype=torch.float64)).sum().backward()
    assert sum(shape == (ROWS, 96) for shape in kept) == 1
    assert not any(shape == (ROWS, 48) for shape in kept)


@pytest.mark.parametrize("dialect", ["official", "fla"])
@pytest.mark.parametrize("whole", [False, True], ids=["layers", "whole model"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointing"])
def test_a_step_under_autocast(again: bool, whole: bool, dialect: str, calls: list[str]) -> None:
    """Gradients are in the weights' dtype, those of plain layers up to roundings, and the same in every run."""
    backend = "aot_eager" if whole or again else "inductor"  # which takes long
    torch.manual_seed(0)
    kind = ForgettingTransformerForCausalLM if dialect == "official" else FlaForgettingTransformerForCausalLM
    model: Any = kind(make_config(dialect, hidden_size=64, num_heads=2, vocab_size=97)).train()
    ids = torch.randint(1, 97, (1, 60))

    def gradients() -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    want = gradients()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    if whole:
        model.compile(backend=backend)
    else:
        compile_layers(model, backend=backend)
    found = gradients()
    assert len(calls) == model.config.num_hidden_layers
    assert torch.equal(gradients(), found)
    # Some ten roundings to bfloat16 in a row, in each of two layers, forward and backward.
    assert (found - want).norm() < 40**0.5 * 2**-9 * want.norm()
