"""What torch.compile makes fewer kernels of in training on a GPU, without being asked to.

Operation by operation, PyTorch reads and writes every element anew, and the host starts a kernel for each. The same
functions run as they are elsewhere, in float64, in layers in evaluation, and in layers that a caller compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Given = ParamSpec("Given")
Result = TypeVar("Result")


@cache
def fused(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Compile a function for the first length that it meets, and once more for all others."""
    heed_hooks()
    return torch.compile(function)


def heed_hooks() -> None:
    """Have torch.compile look for hooks in every call, in this process from now on, and not only while it traces.

    The code of one layer serves all. Another one may have a hook, and may get it later.
    """
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def can_fuse(x: torch.Tensor) -> bool:
    """Return whether what is computed of a tensor gains by :func:`fused`."""
    return x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling()


def fuses(module: nn.Module, x: torch.Tensor) -> bool:
    """Return whether ``module`` computes by :func:`fused`, given its input.

    The replicas of torch.nn.DataParallel do not: they are new modules in every step.
    """
    return module.training and can_fuse(x) and not getattr(module, "_is_replica", False)


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Return whether torch.export traces.

    PyTorch 2.11 takes the answer for true in every graph that torch.compile traces, so it is not asked there.
    """
    return torch.compiler.is_exporting()


def traced_with_gradients() -> bool:
    """Return whether torch.compile traces what gradients will be asked of, in a training step as a rule."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and not exporting()


def recomputed(function: Callable[..., Result], *given: Any) -> Result:
    """Call a function whose results torch.compile is to compute again in the backward pass.

    It finds them from the function's arguments, which are kept anyway. Left to itself, torch.compile would keep all
    that a matrix product takes. The function works element by element, so that this costs little.
    """
    if not traced_with_gradients():
        return function(*given)
    result: Result = checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)
    return result
