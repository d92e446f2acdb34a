"""What autocast does to tensors that several projections read."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def autocasts(kind: str) -> bool:
    """Return whether a kind of device knows autocast. torch.compile of PyTorch 2.11 cannot trace this question."""
    return torch.amp.is_autocast_available(kind)


def projection_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return in which dtype projections compute, given one: that of autocast where it is on, else that."""
    on = autocasts(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on and dtype != torch.float64 else dtype


def for_projections(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype in which projections compute.

    Autocast by itself would cast x once for each projection, and the gradient of x once more for each.
    """
    return x.to(projection_dtype(x.device, x.dtype))
