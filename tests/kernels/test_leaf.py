"""Every leaf function has one signature: the plain form's, the kernel's and the dispatcher's."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from tests.support import ROOT


def folders_with(name: str) -> list[str]:
    """The packages under ``kernels`` that have a file of this name."""
    paths = (ROOT / "kernels").rglob(name)
    return sorted(path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in paths)


LEAVES = folders_with("kernel.py")


@pytest.mark.parametrize("name", LEAVES)
def test_twin_and_kernel_have_the_same_signature(name: str) -> None:
    """Parameters, their order, kinds and annotations, of all public functions that both have."""
    twin, kernel = (import_module(f"vllm_fox.{name}.{part}") for part in ("reference", "kernel"))

    def functions(module: object) -> dict[str, inspect.Signature]:
        return {
            f.__name__: inspect.signature(f)
            for f in vars(module).values()
            if inspect.isfunction(f) and f.__module__ == module.__name__ and not f.__name__.startswith("_")  # type: ignore[attr-defined]
        }

    shared = functions(twin).keys() & functions(kernel).keys()
    assert shared
    for function in shared:
        assert functions(twin)[function] == functions(kernel)[function], function


@pytest.mark.parametrize("name", [name for name in LEAVES if (ROOT / name.replace(".", "/") / "cpu.py").exists()])
def test_twin_and_cpp_have_the_same_signature(name: str) -> None:
    twin, cpp = (import_module(f"vllm_fox.{name}.{part}") for part in ("reference", "cpu"))
    own = [f for f in vars(cpp).values() if inspect.isfunction(f) and f.__module__ == cpp.__name__]
    assert own
    for function in own:
        assert inspect.signature(function) == inspect.signature(getattr(twin, function.__name__))


def test_every_leaf_has_a_twin_and_a_kernel() -> None:
    assert LEAVES and folders_with("reference.py") == LEAVES
