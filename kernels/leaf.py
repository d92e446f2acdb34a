"""Which implementation of a leaf function runs: Triton on a GPU, C++ or plain PyTorch on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch

from .native import can_compile, knows


class OnDevice(Protocol):
    """What a leaf function's first argument is: tensors that are all on one device."""

    @property
    def device(self) -> torch.device: ...


First = TypeVar("First", bound=OnDevice)
Others = ParamSpec("Others")
Result = TypeVar("Result")


def leaf(
    reference: Callable[Concatenate[First, Others], Result],
    kernel: Callable[[], Callable[Concatenate[First, Others], Result]],
    cpu: Callable[Concatenate[First, Others], Result] | None = None,
) -> Callable[Concatenate[First, Others], Result]:
    """A leaf function that runs one of its implementations, by the device of its first argument.

    A type checker refuses implementations of which one does not take what the other does, by name and type.

    Args:
        reference: the plain PyTorch implementation, which documents the function.
        kernel: returns the Triton implementation. It is called when that is first needed, so that Triton is not
            imported before.
        cpu: the implementation in C++, where there is one. It runs if it knows the ``dtype`` of the first argument.

    Returns:
        The function, with the signature and the docstring of ``reference``.
    """
    load = cache(kernel)

    @wraps(reference)
    def run(first: First, /, *args: Others.args, **kwargs: Others.kwargs) -> Result:
        if use_triton(first.device):
            implementation = load()
        elif cpu is not None and use_native(first.device) and knows(first):
            implementation = cpu
        else:
            implementation = reference
        return implementation(first, *args, **kwargs)

    return run


class LazyKernel:
    """Stands for a package's module ``kernel``, which is imported when something of it is asked for.

    Args:
        package: the package's name.
    """

    def __init__(self, package: str) -> None:
        self._name = f"{package}.kernel"

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


def use_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the Triton kernels.

    On CPU they do so only under ``TRITON_INTERPRET=1``, Triton's interpreter, which is for tests.
    """
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def use_native(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the functions in C++, where there are such: on a CPU with a compiler."""
    return device.type == "cpu" and can_compile()


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 where there is none, so that the interpreter's grids stay small."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
