"""What autocast does to tensors that several projections read."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def autocasts(kind: str) -> bool:
    """Return whether a kind of device knows autocast. torch.compile of PyTorch 2.11 cannot trace this question."""
    return torch.amp.is_autocast_available(kind)


def for_projections(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype in which projections compute: that of autocast where it is on, else its own.

    Autocast by itself would cast x once for each projection, and the gradient of x once more for each.
    """
    kind = x.device.type
    on = autocasts(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on and x.dtype != torch.float64 else x
