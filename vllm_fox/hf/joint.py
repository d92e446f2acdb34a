"""Several linear layers of the same input as one matrix product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .autocast import for_projections
from .fused import recomputed, traced_with_gradients
from .plain import is_plain

ALIGNED = 16
"""The number of rows of a joint matrix is a multiple of this. Matrix products of odd sizes are slow on a GPU."""


def joint(x: torch.Tensor, layers: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Return what each of some linear layers makes of x [..., in]: tensors [..., out of the layer].

    While torch.compile traces a training step, the layers that are plain ones become one product, and so do their
    gradients. Then x is read once. The gradient of x is one sum in float32, where each layer by itself would round
    a part of it and add that to the others. A product with a few outputs costs a GPU as much as one with hundreds.
    """
    traced = traced_with_gradients()
    joined = [layer for layer in layers if traced and isinstance(layer, nn.Linear) and _may_join(layer)]
    if len(joined) < 2:
        return [layer(x) for layer in layers]
    joined.sort(key=lambda layer: -len(layer.weight))  # so that the parts begin where a GPU reads fast
    weights = [for_projections(layer.weight) for layer in joined]
    sizes = [len(weight) for weight in weights]
    sizes.append(-sum(sizes) % ALIGNED)
    weights.append(weights[0].new_zeros(sizes[-1], x.shape[-1]))
    # The matrix is made again in the backward pass, or a copy of all weights would be kept until then.
    together = recomputed(_together, *weights)
    parts = dict(zip(joined, F.linear(x, together).split(sizes, -1)))
    return [_with_bias(parts[layer], layer.bias) if layer in parts else layer(x) for layer in layers]


def _may_join(layer: nn.Linear) -> bool:
    """Return whether a layer need not be called, and its weights are being trained."""
    # The weights of a layer that is sharded by itself are of another type.
    trained = layer.training and type(layer.weight) is nn.Parameter and layer.weight.requires_grad
    return trained and is_plain(layer)


def _together(*weights: torch.Tensor) -> torch.Tensor:
    return torch.cat(weights)


def _with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return y if bias is None else (y + bias).to(y.dtype)
