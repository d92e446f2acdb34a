"""Which implementation of a leaf function runs: Triton on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

import os
from functools import cache

import torch


def use_triton(device: torch.device) -> bool:
    """Whether tensors on ``device`` go to the Triton kernels.

    On CPU they do so only under ``TRITON_INTERPRET=1``, Triton's interpreter, which is for tests.
    """
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 4 where there is none, so that the interpreter's grids stay small."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
