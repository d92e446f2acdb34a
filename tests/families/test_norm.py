"""A layer's norms with the sums that they are applied to: one operator for their gradients in a compiled step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn

from tests.families.test_training_step import fla, fox, tokens
from vllm_fox.hf import compile_layers
from vllm_fox.hf.fox.norm import RMSNorm, add_norm


def counting(seen: list[int]) -> Any:
    """A backend that computes as PyTorch does; notes of each graph how many norms it has the operator for."""

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        bodies = [module for name, module in graph.named_modules() if name]
        seen.append(sum("add_rms_norm_backward" in str(body.code) for body in bodies))
        return graph.forward

    return backend


def step(model: Any, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of all weights that have one."""
    model.zero_grad()
    ids = tokens(2, 24)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def agree(model: Any, reference: Any, dtype: torch.dtype | None = None, within: float = 1e-5) -> None:
    """Hold a step against another model's: the difference of each gradient, by its size."""
    (loss, grads), (want_loss, want) = step(model, dtype), step(reference, dtype)
    torch.testing.assert_close(loss, want_loss, rtol=within, atol=0)
    assert grads.keys() == want.keys()
    largest = max(grad.norm() for grad in want.values())
    for name, grad in grads.items():
        assert grad.dtype == want[name].dtype
        # Softmax does not see a bias of keys, whose gradient is nothing but roundings.
        assert (grad - want[name]).norm() <= within * max(want[name].norm(), largest / 1000), name


def unchanged(model: Any) -> None:
    pass


def with_random_weights(model: Any) -> None:
    draw = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.data.copy_(torch.randn(module.weight.shape, generator=draw))


def with_frozen_norm(model: Any) -> None:
    model.model.layers[0].attn_norm.weight.requires_grad_(False)


def with_frozen_stream(model: Any) -> None:
    model.model.embeddings.requires_grad_(False)


def with_adapters_alone(model: Any) -> None:
    """What reaches the first layer has no gradient, and its norms have none."""
    model.requires_grad_(False)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)


def with_hook(model: Any) -> None:
    model.model.layers[0].mlp_norm.register_forward_hook(lambda norm, given, y: 2 * y)


def with_backward_hook(model: Any) -> None:
    model.model.layers[0].attn_norm.register_full_backward_hook(lambda norm, given, out: (3 * given[0],))


def with_other_forward(model: Any) -> None:
    norm = model.model.layers[0].attn_norm
    norm.forward = MethodType(lambda norm, x: 2 * RMSNorm.forward(norm, x), norm)


def with_other_class(model: Any) -> None:
    class Doubled(RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.model.layers[0].mlp_norm = Doubled(64, 1e-6)


def with_norm_in_evaluation(model: Any) -> None:
    model.model.layers[0].mlp_norm.eval()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (unchanged, 2), (with_random_weights, 2), (with_frozen_norm, 2), (with_frozen_stream, 2),
        (with_adapters_alone, 2), (with_hook, 1), (with_backward_hook, 1), (with_other_forward, 1),
        (with_other_class, 1), (with_norm_in_evaluation, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [fox, fla])
def test_gradients_are_those_of_plain_layers(
    make: Callable[..., Any], change: Callable[[Any], None], expected: int
) -> None:
    """In float32, where both differ by a few roundings. A norm that is not plain is called."""
    models, seen = (make(), make()), list[int]()
    for model in models:
        change(model)
    torch._dynamo.reset()
    compile_layers(models[0], backend=counting(seen))
    agree(*models)
    # Layers that differ from the first have code of their own. Where nothing has gradients there is no operator.
    assert expected in seen and set(seen) <= {expected, 2, 0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast(dtype: torch.dtype, weights: torch.dtype) -> None:
    """Gradients that differ by a rounding in one place differ by several further on."""
    models, seen = [fox().to(weights) for _ in range(2)], list[int]()
    torch._dynamo.reset()
    compile_layers(models[0], backend=counting(seen))
    eps = max(torch.finfo(dtype).eps, torch.finfo(weights).eps)
    agree(models[0], models[1], dtype, within=4 * eps)
    assert set(seen) == {2}


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    models, seen = (fox(), fox()), list[int]()
    models[0].gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch._dynamo.reset()
    compile_layers(models[0], backend=counting(seen))
    agree(*models)
    assert 2 in seen


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compilers_compute_the_same(backend: str) -> None:
    models = fox(), fox()
    for model in models:
        with_random_weights(model)
    torch._dynamo.reset()
    compile_layers(models[0], backend=backend)
    for _ in range(2):
        agree(*models)


@pytest.mark.parametrize("how", ["evaluation", "no gradients", "float64"])
def test_elsewhere_norms_are_called(how: str) -> None:
    model, seen, ids = fox(), list[int](), tokens(2, 24)
    torch._dynamo.reset()
    compile_layers(model, backend=counting(seen))
    model.train(how != "evaluation").to(torch.float64 if how == "float64" else torch.float32)
    with torch.set_grad_enabled(how != "no gradients"):
        model(input_ids=ids, labels=ids, use_cache=False)
    assert seen and not any(seen)


def test_what_is_kept_is_the_sum_and_not_its_parts() -> None:
    """Of a layer, by torch.compile: beside what matrix products take, the two sums and a number for each row."""
    torch._dynamo.reset()
    model, kept = fox(num_hidden_layers=1), dict[int, torch.Tensor]()
    layer, ids = model.model.layers[0], tokens(1, 40)
    given: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, args: given.append(args))
    model(input_ids=ids, labels=ids)
    handle.remove()
    x, line, _ = given[0]

    def keep(y: torch.Tensor) -> torch.Tensor:
        kept[y.data_ptr()] = y
        return y

    x = x.detach().requires_grad_()
    compiled: Any = torch.compile(type(layer)._compute)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        out = compiled(layer, x, line, None)
    out.sum().backward()
    streams = [y for y in kept.values() if y.shape == x.shape and y.dtype == torch.float32]
    assert len(streams) == 2 and any(y.data_ptr() == x.data_ptr() for y in streams)


def test_a_layer_can_be_exported() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm(24, 1e-6)

        def forward(self, x: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return add_norm(self.norm, x, delta)

    module, given = Both(), (torch.randn(7, 24), torch.randn(7, 24))
    exported = torch.export.export(module, given, strict=True)
    assert "add_rms_norm" not in str(exported)
    for one, other in zip(exported.module()(*given), module(*given), strict=True):
        torch.testing.assert_close(one, other)
