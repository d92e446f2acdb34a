"""Launching Triton kernels many times a step.

``kernel[grid](...)`` binds and specialises every argument anew, which for forty arguments takes the host longer
than a short prompt's kernel takes the GPU. A :class:`Launcher` does so once for what a kernel is compiled for, and
afterwards launches the compiled kernel itself, with all arguments in their order, as Triton's tutorial on fused
softmax does. Triton promises nothing about it, so it is tried out first (:func:`compiled_kernels_can_be_launched`).
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from functools import cache, reduce
from operator import or_
from typing import Any

import torch
import triton

from .common import trial_kernel

logger = logging.getLogger(__name__)

ALIGNMENT = 16
"""Triton compiles another kernel, with narrower loads, for tensors that are not aligned to so many bytes."""


class Launcher:
    """Launches one Triton function, whose parameters stand in the order of the arguments of :meth:`__call__`.

    Args:
        function: what ``@triton.jit`` made. Its ``do_not_specialize`` names all parameters that come as ``loose``.
        early: have the GPU start the kernel while the one before it ends (programmatic dependent launch), where it
            can. The function's last parameter is whether it does, and the function hands that to
            :func:`.common.take_turn`. One that starts without it waits for what was launched before, as ever.
    """

    def __init__(self, function: Any, early: bool = False) -> None:
        self.function, self.early = function, early
        self._compiled: dict[Hashable, Any] = {}

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
        if self.early:
            early = starts_early(tensors[0].device)
            constants += (early,)
            if early:  # Triton's interpreter does not know the option
                options["launch_pdl"] = True
        types = [tensor.dtype for tensor in tensors] + [getattr(value, "dtype", None) for value in loose]
        key = (tensors[0].device, *types, strides, constants, *options.values())
        compiled = self._compiled.get(key)
        aligned = reduce(or_, [tensor.data_ptr() for tensor in tensors]) % ALIGNMENT == 0
        if compiled is not None and aligned:
            compiled[grid](*tensors, *loose, *strides, *constants)
            return
        compiled = self.function[grid](*tensors, *loose, *strides, *constants, **options)
        # Triton's interpreter compiles nothing and returns None.
        if aligned and compiled is not None and compiled_kernels_can_be_launched(tensors[0].device):
            self._compiled[key] = compiled


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a device can start a kernel while the one before it ends: NVIDIA's from compute capability 9.0 on."""
    if device.type != "cuda" or torch.version.hip is not None or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def compiled_kernels_can_be_launched(device: torch.device, trial: Any = trial_kernel) -> bool:
    """Whether this Triton launches a compiled kernel with the arguments that :class:`Launcher` gives it.

    A kernel of one tensor, one number, one stride and one constant is launched with other values than it was
    compiled with, and must write what they say. If it does not, a warning is logged, once, and every launch binds
    its arguments anew: that is slower and right.

    Args:
        device: a CUDA device. Its current stream is waited for, once in the life of a process.
        trial: the kernel, which tests replace by one that misbehaves.
    """
    out = torch.full((4,), -1, dtype=torch.int32, device=device)
    try:
        compiled = trial[(1, 1, 1)](out, 1, 2, 10)
        compiled[(2, 1, 1)](out, 7, 2, 10)
        found: Any = out.tolist()
    except Exception as error:  # whatever another Triton says to arguments that it does not take
        found = f"{type(error).__name__}: {error}"
    expected = [70, -1, 71, -1]
    if found != expected:
        logger.warning(
            "Triton %s launches compiled kernels otherwise than expected (%s instead of %s), so vllm-fox binds the "
            "arguments of every launch anew, which costs the host time. Kernels' results are not affected.",
            triton.__version__,
            found,
            expected,
        )
    return bool(found == expected)
