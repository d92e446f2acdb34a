"""Load a checkpoint's tensors into a vLLM model. Missing, unexpected or non-finite tensors are errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from vllm_fox.checkpoint_files import damaged_files

_LISTED = 10
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Destination = tuple[str, str | int | None, torch.Tensor]
"""A parameter's name, the part of it to fill (None unless several tensors share it), and the values."""
TIED_HEAD = "lm_head.weight"
"""The output embeddings' parameter. Where it is tied, the input embeddings go there too."""
Destinations = Callable[[str, torch.Tensor], Iterator[Destination]]
"""A function that yields where a checkpoint's tensor goes, given its name and values."""


def heads_compared(
    weights: Iterable[tuple[str, torch.Tensor]], embeddings: str, head: str, compared: Callable[[bool], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass tensors on, and tell whether the output head equals the embeddings, if both are among them."""
    seen: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if name in (embeddings, head):
            seen[name] = tensor
            if len(seen) == 2:
                one, other = seen[embeddings], seen[head]
                compared(one.shape == other.shape and torch.equal(one.float(), other.float()))
        yield name, tensor


class CheckpointLoader:
    """Fills a model's parameters: all of them at first, and any part of them whenever weights are updated later.

    Args:
        vllm_config: the engine's configuration.
        expected: names and shapes of a checkpoint's tensors.
        kind: kind of checkpoint, for errors.

    Attributes:
        has_weights: whether the model has weights already, so that a call may bring a part of them.
        head_is_embeddings: whether the last checkpoint with an output head had the embeddings for it.
    """

    def __init__(self, vllm_config: VllmConfig, expected: Mapping[str, tuple[int, ...]], kind: str) -> None:
        self._model_config, self._expected, self._kind = vllm_config.model_config, expected, kind
        # Dummy weights are there from the start, for a trainer to replace them part by part.
        self.has_weights = vllm_config.load_config.load_format == "dummy"
        self.head_is_embeddings = False

    def fill(
        self, model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], destinations: Destinations
    ) -> set[str]:
        """Fill parameters from a checkpoint, or from a part of one if the model has weights already.

        Args:
            model: the vLLM model.
            weights: names and tensors, in any order.
            destinations: where each tensor goes.

        Returns:
            Names of the parameters that were filled.

        Raises:
            ValueError: tensors are missing, unexpected, of a wrong shape or of a quantised dtype, or they hold NaN
                or infinity. One message names them (the first ten) with what was expected. Or a file is damaged,
                which the message names.
        """
        missing, problems, filled = dict(self._expected), list[str](), set[str]()
        params = dict(model.named_parameters())
        try:
            for name, tensor in weights:
                problem = self._problem(name, tensor)
                if problem is None and name not in missing and not self.has_weights:
                    problem = f"tensor {name} is there twice"
                if problem is None:
                    missing.pop(name, None)
                    names, finite = _fill(model, params, destinations(name, tensor))
                    filled |= names
                    problem = None if finite else f"tensor {name} has values that are NaN or infinite"
                if problem is not None:
                    problems.append(problem)
        except (SafetensorError, json.JSONDecodeError, struct.error, MemoryError, OSError) as error:
            damaged = list(damaged_files(_folder(self._model_config)))
            if not damaged and isinstance(error, MemoryError | OSError):
                raise
            raise ValueError(" ".join(damaged) or f"A file of the checkpoint is damaged: {error}.") from None
        if not self.has_weights:
            problems += [f"missing tensor {name}, expected {list(shape)}" for name, shape in missing.items()]
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise ValueError(
                f"The checkpoint's weights do not fit its config.json ({self._kind}): "
                + "; ".join(problems[:_LISTED])
                + more
                + "."
            )
        self.has_weights = True
        return filled

    def _problem(self, name: str, tensor: torch.Tensor) -> str | None:
        if name not in self._expected:
            return f"unexpected tensor {name} {list(tensor.shape)}"
        if tuple(tensor.shape) != self._expected[name]:
            return f"tensor {name} is {list(tensor.shape)}, expected {list(self._expected[name])}"
        if tensor.dtype not in _DTYPES:
            return f"tensor {name} is {tensor.dtype}, expected float16, bfloat16 or float32"
        return None


def _fill(
    model: nn.Module, params: Mapping[str, nn.Parameter], destinations: Iterable[Destination]
) -> tuple[set[str], bool]:
    """Fill the parameters of this pipeline stage; returns their names, and whether the values are finite."""
    filled, finite = set(), True
    for target, part, piece in destinations:
        if is_pp_missing_parameter(target, model):
            continue  # it belongs to another pipeline stage
        if target == TIED_HEAD and target not in params:
            continue  # it is the embeddings' own parameter, except while vLLM reloads both
        param = params[target]
        if not param.numel():
            raise ValueError(
                f"The weight {target} cannot be written: vLLM's CPU build has packed it. Use the engine's "
                "reload_weights, or a weight update, which unpack it."
            )
        loader: Callable[..., None] = getattr(param, "weight_loader", default_weight_loader)
        loader(param, piece) if part is None else loader(param, piece, part)
        filled.add(target)
        # In vLLM's sparse updates NaN stands for a value that stays as it is, so what was written decides.
        if not _is_finite(piece) and (param.is_meta or not _is_finite(param.data)):
            finite = False
    return filled, finite


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one pass that needs no memory."""
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def _folder(model_config: ModelConfig) -> Path:
    """Return the folder of the checkpoint's files."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    try:
        return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(model_config.model)
