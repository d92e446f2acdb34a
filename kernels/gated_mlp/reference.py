"""The backward pass of a gated MLP's product in plain PyTorch."""

from __future__ import annotations

import torch


def product_backward(
    grad: torch.Tensor, gate_up: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiate the product ``act(gate) * up``, and compute it again.

    All is computed in float32 or wider, and rounded once.

    Args:
        grad: [N, I] gradient of the product.
        gate_up: [N, 2 I] in the same dtype: I columns of the gate, and then I of up.
        activation: "silu" or "sigmoid".

    Returns:
        The gradient of ``gate_up`` [N, 2 I], and the product [N, I], both in its dtype and contiguous.
    """
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    given, (gate, up) = grad.to(wide), gate_up.to(wide).chunk(2, 1)
    one, rest = gate.sigmoid(), (-gate).sigmoid()  # 1 - one would have few digits where one is nearly 1
    if activation == "silu":
        act, slope = gate * one, one * (1 + gate * rest)
    else:
        act, slope = one, one * rest
    product = (act * up).to(gate_up.dtype).contiguous()
    return torch.cat((given * up * slope, given * act), 1).to(gate_up.dtype), product
