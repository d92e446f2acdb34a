"""Several linear layers of the same input as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .autocast import for_projections
from .fused import recomputed, traced_with_gradients
from .plain import is_trained_plain

ALIGNED = 16
"""The number of rows of a joint matrix is a multiple of this. Matrix products of odd sizes are slow on a GPU."""


def joint(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Return what each of some linear layers makes of x [..., in]: tensors [..., out of the layer].

    While torch.compile traces a training step, the layers that are plain ones become one product, and so do their
    gradients. Then x is read once. The gradient of x is one sum in float32, where each layer by itself would round
    a part of it and add that to the others. A product with a few outputs costs a GPU as much as one with hundreds.
    """
    joined = _joined(layers)
    if len(joined) < 2:
        return [layer(x) for layer in layers]
    joined.sort(key=lambda layer: -len(layer.weight))  # so that the parts begin where a GPU reads fast
    made = _product(x, [layer.weight for layer in joined])
    sizes = [len(layer.weight) for layer in joined]
    parts = dict(zip(joined, made.split([*sizes, made.shape[-1] - sum(sizes)], -1)))
    return [_with_bias(parts[layer], layer.bias) if layer in parts else layer(x) for layer in layers]


def side_by_side(x: torch.Tensor, layers: Sequence[nn.Module]) -> torch.Tensor | None:
    """Return what :func:`joint` makes of x as one tensor: the layers' columns in their order.

    None if not all of them become one product, or if one has a bias.
    """
    joined = _joined(layers)
    if len(joined) < len(layers) or any(layer.bias is not None for layer in joined):
        return None
    return _product(x, [layer.weight for layer in joined])[..., : sum(len(layer.weight) for layer in joined)]


def _joined(layers: Sequence[nn.Module]) -> list[nn.Linear]:
    """Return those of some layers that become one product."""
    return [layer for layer in layers if is_trained_plain(layer)] if traced_with_gradients() else []


def _product(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return x times all weights [..., out of all], followed by zeros as padding."""
    matrices = [for_projections(weight) for weight in weights]
    padding = -sum(len(matrix) for matrix in matrices) % ALIGNED
    matrices.append(matrices[0].new_zeros(padding, x.shape[-1]))
    # The matrix is made again in the backward pass, or a copy of all weights would be kept until then.
    return F.linear(x, recomputed(_together, *matrices))


def _together(*weights: torch.Tensor) -> torch.Tensor:
    return torch.cat(weights)


def _with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else (y + bias).to(y.dtype)
