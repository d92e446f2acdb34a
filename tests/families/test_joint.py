"""Linear layers of the same input as one matrix product, and what a compiled training step computes again."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from vllm_fox.hf.fused import recomputed
from vllm_fox.hf.joint import ALIGNED, joint


class Layers(nn.Module):
    """Layers of one input, of odd sizes, some with a bias."""

    def __init__(self) -> None:
        super().__init__()
        made = [nn.Linear(24, rows, bias=rows == 3, dtype=torch.float64) for rows in (3, 40, 24, 5)]
        self.layers = nn.ModuleList(made)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return joint(x, list(self.layers))


def compiled(module: nn.Module, seen: list[str]) -> Any:
    """The module by torch.compile; notes the operators that it asks for."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(module, backend=backend)


def products(seen: list[str]) -> int:
    return sum("linear" in name for name in seen)


def results(call: Any, module: Layers, x: torch.Tensor) -> list[torch.Tensor]:
    """What the layers make of x, and the gradients of x and of the weights that are trained."""
    x = x.clone().requires_grad_()
    made = call(x)
    order = torch.Generator().manual_seed(1)
    weighted = [(y * torch.randn(y.shape, generator=order, dtype=y.dtype)).sum() for y in made]
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    return [*made, *torch.autograd.grad(sum(weighted, start=torch.zeros(())), [x, *trained])]


def freeze(module: Layers) -> None:
    module.layers[1].weight.requires_grad_(False)


def hook(module: Layers) -> None:
    module.layers[1].register_forward_hook(lambda layer, given, y: 2 * y)


def replace(module: Layers) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module.layers[1] = Doubled(24, 40, bias=False, dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "expected"), [(lambda module: None, 1), (freeze, 2), (hook, 2), (replace, 2)],
    ids=["all plain", "one frozen", "one with a hook", "one of another class"],
)  # fmt: skip
def test_plain_layers_become_one_product(change: Any, expected: int) -> None:
    """The others compute by themselves, and nothing else changes."""
    module, seen = Layers(), list[str]()
    change(module)
    x = torch.randn(7, 24, dtype=torch.float64)
    want = results(module, module, x)
    found = results(compiled(module, seen), module, x)
    assert products(seen) == expected
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("evaluation", [True, False])
def test_layers_stay_apart_outside_of_training(evaluation: bool) -> None:
    module, seen = Layers().train(not evaluation), list[str]()
    with torch.set_grad_enabled(evaluation):
        compiled(module, seen)(torch.randn(7, 24, dtype=torch.float64))
    assert products(seen) == len(module.layers)


def test_the_joint_matrix_has_an_even_size() -> None:
    sizes = list[int]()

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        (product,) = [node for node in graph.graph.nodes if "linear" in str(node.target)]
        sizes.append(product.meta["example_value"].shape[-1])
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Layers(), backend=backend)(torch.randn(7, 24, dtype=torch.float64))
    (rows,) = sizes
    assert rows >= 72 and rows % ALIGNED == 0


def test_what_is_computed_again_is_not_kept() -> None:
    """The product of a gated MLP's halves, which a matrix product takes."""
    torch._dynamo.reset()
    kept = list[torch.Size]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    def halves(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(gate) * up

    weights = [torch.randn(n, m, requires_grad=True) for n, m in ((16, 80), (40, 16))]

    def mlp(x: torch.Tensor, again: bool) -> torch.Tensor:
        gate, up = (x @ weights[0]).chunk(2, -1)
        return (recomputed(halves, gate, up) if again else halves(gate, up)) @ weights[1]

    counts, gradients = list[int](), list[tuple[torch.Tensor, ...]]()
    for again in (False, True):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = torch.compile(mlp)(torch.ones(9, 16), again)
        counts.append(sum(sorted(shape) == [9, 40] for shape in kept))
        gradients.append(torch.autograd.grad(out.sum(), weights))
    assert counts == [1, 0]
    # Inductor multiplies and adds in another order, in float32.
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_no_copy_of_the_weights_is_kept() -> None:
    """Without autocast the layers' own weights are there in the backward pass."""
    torch._dynamo.reset()
    module, kept = Layers(), list[int]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        made = torch.compile(module)(torch.ones(7, 24, dtype=torch.float64, requires_grad=True))
    torch.stack([y.sum() for y in made]).sum().backward()
    assert kept and max(kept) <= max(weight.numel() for weight in module.parameters())


@pytest.mark.parametrize("of", ["a layer", "a layer, by a method", "all layers"])
def test_a_forward_that_is_replaced_later_is_called(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an attribute of the layer, as accelerate does it, or of the class."""
    module, x = Layers(), torch.randn(7, 24, dtype=torch.float64)
    call = compiled(module, [])
    call(x)
    own, layer = nn.Linear.forward, module.layers[1]
    if of == "all layers":
        monkeypatch.setattr(nn.Linear, "forward", lambda layer, given: 2 * own(layer, given))
    elif of == "a layer, by a method":
        monkeypatch.setattr(layer, "forward", MethodType(lambda layer, given: 2 * own(layer, given), layer))
    else:
        monkeypatch.setattr(layer, "forward", lambda given: 2 * own(layer, given))
    for one, other in zip(call(x), module(x), strict=True):
        torch.testing.assert_close(one, other)


def test_a_hook_of_all_modules_is_called() -> None:
    module, x = Layers(), torch.randn(7, 24, dtype=torch.float64)

    def tripled(layer: nn.Module, given: Any, y: Any) -> Any:
        return 3 * y if isinstance(layer, nn.Linear) else y

    hook = nn.modules.module.register_module_forward_hook(tripled)
    try:
        for one, other in zip(compiled(module, [])(x), module(x), strict=True):
            torch.testing.assert_close(one, other)
    finally:
        hook.remove()


class Again(nn.Module):
    """Layers, and what is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([recomputed(nn.functional.silu, y) for y in self.own(x)], -1)


def test_a_model_can_be_exported() -> None:
    module, x = Again(), torch.randn(7, 24, dtype=torch.float64)
    exported = torch.export.export(module, (x,), strict=True)
    torch.testing.assert_close(exported.module()(x), module(x))
