"""Load a checkpoint's tensors into a vLLM model. Missing or unexpected tensors are errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

_LISTED = 10
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Destination = tuple[str, str | int | None, torch.Tensor]
"""A parameter's name, the part of it to fill (None unless several tensors share it), and the values."""


def fill_parameters(
    model: nn.Module,
    expected: Mapping[str, tuple[int, ...]],
    weights: Iterable[tuple[str, torch.Tensor]],
    destinations: Callable[[str, torch.Tensor], Iterator[Destination]],
    kind: str,
) -> set[str]:
    """Fill a model's parameters from a checkpoint.

    Args:
        model: the vLLM model.
        expected: names and shapes of a checkpoint's tensors.
        weights: names and tensors of the checkpoint, in any order.
        destinations: function that yields where a tensor goes, given its name and values.
        kind: kind of checkpoint, for errors.

    Returns:
        Names of the parameters that were filled: all that this pipeline stage has.

    Raises:
        ValueError: tensors are missing, unexpected, of a wrong shape or of a quantised dtype. One message
            names them (the first ten) with what was expected.
    """
    params = dict(model.named_parameters())
    missing, problems, filled = dict(expected), [], set()
    for name, tensor in weights:
        if name not in expected:
            problems.append(f"unexpected tensor {name} {list(tensor.shape)}")
            continue
        missing.pop(name, None)
        if tuple(tensor.shape) != expected[name]:
            problems.append(f"tensor {name} is {list(tensor.shape)}, expected {list(expected[name])}")
            continue
        if tensor.dtype not in _DTYPES:
            problems.append(f"tensor {name} is {tensor.dtype}, expected float16, bfloat16 or float32")
            continue
        for target, part, piece in destinations(name, tensor):
            if is_pp_missing_parameter(target, model):
                continue  # it belongs to another pipeline stage
            param = params[target]
            loader: Callable[..., None] = getattr(param, "weight_loader", default_weight_loader)
            loader(param, piece) if part is None else loader(param, piece, part)
            filled.add(target)
    problems += [f"missing tensor {name}, expected {list(shape)}" for name, shape in missing.items()]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"The checkpoint's weights do not fit its config.json ({kind}): "
            + "; ".join(problems[:_LISTED])
            + more
            + "."
        )
    return filled
