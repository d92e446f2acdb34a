"""Launching Triton kernels many times a step.

``kernel[grid](...)`` binds and specialises every argument anew, which for forty arguments takes the host longer
than a short prompt's kernel takes the GPU. A :class:`Launcher` does so once for what a kernel is compiled for.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import reduce
from operator import or_
from typing import Any

import torch
from triton.compiler import CompiledKernel

ALIGNMENT = 16
"""Triton compiles another kernel, with narrower loads, for tensors that are not aligned to so many bytes."""


class Launcher:
    """Launches one Triton function, whose parameters stand in the order of the arguments of :meth:`__call__`.

    Args:
        function: what ``@triton.jit`` made. Its ``do_not_specialize`` names all parameters that come as ``loose``.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self._compiled: dict[Hashable, CompiledKernel] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        loose: tuple[Any, ...],
        strides: tuple[int, ...],
        constants: tuple[Hashable, ...],
        **options: int | None,
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: programs.
            tensors: that Triton may find aligned.
            loose: tensors that may begin anywhere, and numbers that may be any.
            strides: of which a process sees few different: a kernel is compiled for each.
            constants: the function's ``tl.constexpr`` parameters.
            options: ``num_warps`` and the like.
        """
        types = [tensor.dtype for tensor in tensors] + [getattr(value, "dtype", None) for value in loose]
        key = (tensors[0].device, *types, strides, constants, *options.values())
        compiled = self._compiled.get(key)
        aligned = reduce(or_, [tensor.data_ptr() for tensor in tensors]) % ALIGNMENT == 0
        if compiled is not None and aligned:
            compiled[grid](*tensors, *loose, *strides, *constants)
            return
        compiled = self.function[grid](*tensors, *loose, *strides, *constants, **options)
        if aligned and isinstance(compiled, CompiledKernel):  # the interpreter compiles nothing
            self._compiled[key] = compiled
