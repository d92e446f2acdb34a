"""What processes exchange that each compute a part of a step with all weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed

BUCKET = 2**26
"""Numbers that are exchanged at once, at most, but for a weight that has more."""


def share_weights(model: torch.nn.Module) -> None:
    """Give all processes the first one's weights and buffers, in place."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            distributed.broadcast(tensor.data, 0)


def average_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients of all processes by their means, in place.

    DistributedDataParallel would exchange them after every backward pass, and cannot be captured with it in a CUDA
    graph. This is called once a step, after the last pass.

    Args:
        weights: the same in every process, as are those among them that have no gradient.
    """
    processes = distributed.get_world_size()
    for gradients in _buckets(weight.grad for weight in weights if weight.grad is not None):
        line = torch.cat([gradient.flatten() for gradient in gradients])
        line /= processes
        distributed.all_reduce(line)
        parts = line.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _buckets(gradients: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Lists of gradients of one dtype, in order, of :data:`BUCKET` numbers at most where they are several."""
    bucket, size = list[torch.Tensor](), 0
    for gradient in gradients:
        if bucket and (size + gradient.numel() > BUCKET or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.numel()
    if bucket:
        yield bucket
