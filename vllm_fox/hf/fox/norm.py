"""The RMS norm of the Forgetting Transformer, alone and together with the sum that it is applied to."""

from __future__ import annotations

import torch
from torch import nn

from vllm_fox.hf.autocast import for_projections, projection_dtype
from vllm_fox.hf.fused import fused, fuses, traced_with_gradients
from vllm_fox.hf.plain import computes
from vllm_fox.kernels.rms_norm import add_rms_norm


class RMSNorm(nn.Module):
    """RMS norm, x / rms(x) * weight, computed in float32 over groups of the last dimension.

    Args:
        shape: size of the weight.
        eps: added to the mean square.
        group: number of elements that are normed together; all of the weight's unless given.
    """

    def __init__(self, shape: int, eps: float, group: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.eps, self.group = eps, group or shape

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., n] to float32 (or wider) [..., n / group, group]."""
        x = x.unflatten(-1, (-1, self.group)).to(torch.promote_types(x.dtype, torch.float32))
        weight = self.weight.to(x.dtype).view(-1, self.group)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., n] to the normed x [..., n]."""
        return fused(type(self)._normed)(self, x) if fuses(self, x) else self._normed(x)

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(x).flatten(-2).to(x.dtype)


PLAIN = RMSNorm.forward
"""What a plain norm computes."""


def add_norm(
    norm: nn.Module, x: torch.Tensor, delta: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the residual stream x [N, n] with what is added to it, and the norm of that as projections read it.

    While torch.compile traces a training step, the gradients of a plain norm and of the sum are one kernel.
    """
    dtype = x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)
    if traced_with_gradients() and dtype != torch.float64 and isinstance(norm, RMSNorm) and _need_not_call(norm):
        return add_rms_norm(x, delta, norm.weight, norm.eps, projection_dtype(x.device, dtype))
    x = x if delta is None else x + delta
    return x, for_projections(norm(x))


def _need_not_call(norm: RMSNorm) -> bool:
    """Return whether a norm of whole rows is in training, and nothing but its weight decides what it computes."""
    # The weight of a layer that is sharded by itself is of another type.
    whole = type(norm.weight) is nn.Parameter and norm.weight.shape == (norm.group,)
    return norm.training and whole and computes(norm, RMSNorm, PLAIN)
