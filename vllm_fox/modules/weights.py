"""Load a checkpoint's tensors into a vLLM model. Missing, unexpected or non-finite tensors are errors."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.platforms import current_platform

from vllm_fox.checkpoint_files import damaged_files

from .linear import is_quantised

_LISTED = 10
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int32, torch.int64)

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


@dataclass(frozen=True)
class Stored:
    """How a checkpoint stores a tensor.

    Attributes:
        shape: its shape; None if that is left to vLLM.
        dtype: of a quantised weight, or of integers that belong to it; None for any that a model can have.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None = None

    @property
    def is_quantised(self) -> bool:
        """Whether it is a quantised weight, or belongs to one."""
        return self.shape is None or self.dtype is not None

    def problem(self, name: str, tensor: torch.Tensor) -> str | None:
        """Say what is wrong with a tensor."""
        if self.shape is not None and tuple(tensor.shape) != self.shape:
            return f"tensor {name} is {list(tensor.shape)}, expected {list(self.shape)}"
        if self.dtype is None and tensor.dtype not in _DTYPES:
            return f"tensor {name} is {tensor.dtype}, expected float16, bfloat16 or float32"
        same = tensor.dtype == self.dtype or (tensor.dtype in _INTEGERS and self.dtype in _INTEGERS)
        if self.dtype is not None and not same:
            return f"tensor {name} is {tensor.dtype}, expected {self.dtype}"
        return None


def as_quantised(
    model: nn.Module, expected: Mapping[str, tuple[int, ...]], layer_of: Callable[[str], str]
) -> dict[str, Stored]:
    """Return how a checkpoint stores its tensors for a model of which some weights are, or become, quantised.

    Tensors of other pipeline stages, whose layers are not here, are left out.

    Args:
        model: the vLLM model, before anything is loaded.
        expected: names and shapes of the tensors of a checkpoint that is not quantised.
        layer_of: returns the name of the layer that a tensor goes into.
    """
    stored = dict[str, Stored]()
    modules = dict(model.named_modules())
    for name, shape in expected.items():
        layer, (stem, _, kind) = modules.get(layer_of(name)), name.rpartition(".")
        if is_pp_missing_parameter(name, model):
            continue
        if kind != "weight" or not isinstance(layer, LinearBase) or not is_quantised(layer):
            stored[name] = Stored(shape)
            continue
        for own, param in layer.named_parameters(recurse=False):
            if own != "bias":
                dtype = None if param.dtype in _DTYPES else param.dtype
                stored[f"{stem}.{own}"] = Stored(shape if own == "weight" else None, dtype)
    return stored


def check_update(model: nn.Module) -> None:
    """Refuse new weights for a model in use whose old ones vLLM cannot replace.

    Raises:
        ValueError: weights are quantised, on a CPU. Kernels there keep addresses of scales that are given up.
    """
    if current_platform.is_cpu() and any(is_quantised(module) for module in model.modules()):
        raise ValueError(
            "Quantised weights cannot be loaded again on a CPU, where vLLM's kernels keep to the first ones: start "
            "the engine again with the new weights."
        )


class CheckpointLoader:
    """Fills a model's parameters: all of them at first, and any part of them whenever weights are updated later.

    Args:
        vllm_config: the engine's configuration.
        expected: names of a checkpoint's tensors, and their shapes or how they are stored.
        kind: kind of checkpoint, for errors.

    Attributes:
        has_weights: whether the model has weights already, so that a call may bring a part of them.
        head_is_embeddings: whether the last checkpoint with an output head had the embeddings for it.
    """

    def __init__(
        self, vllm_config: VllmConfig, expected: Mapping[str, tuple[int, ...] | Stored], kind: str
    ) -> None:
        self._model_config, self._kind = vllm_config.model_config, kind
        self._expected = {name: one if isinstance(one, Stored) else Stored(one) for name, one in expected.items()}
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
            ValueError: tensors are missing, unexpected, of a wrong shape or dtype, or they hold NaN or infinity.
                One message names them (the first ten) with what was expected. Or a file is damaged, which the
                message names. Or quantised weights cannot be replaced.
        """
        if self.has_weights:
            check_update(model)
        missing, problems, filled = dict(self._expected), list[str](), set[str]()
        # Where adapters are in use, vLLM has moved the weights, but goes on naming them as before.
        params = {name.replace(".base_layer.", "."): param for name, param in model.named_parameters()}
        try:
            for name, tensor in weights:
                if name not in self._expected and is_pp_missing_parameter(name, model):
                    continue  # how it is stored is known where it belongs, on another pipeline stage
                problem = self._problem(name, tensor)
                if problem is None and name not in missing and not self.has_weights:
                    problem = f"tensor {name} is there twice"
                if problem is None:
                    missing.pop(name, None)
                    names, finite = _fill(model, params, destinations(name, tensor), update=self.has_weights)
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
            problems += [
                f"missing tensor {name}" + ("" if one.shape is None else f", expected {list(one.shape)}")
                for name, one in missing.items()
            ]
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
        return self._expected[name].problem(name, tensor)


def _fill(
    model: nn.Module, params: Mapping[str, nn.Parameter], destinations: Iterable[Destination], update: bool
) -> tuple[set[str], bool]:
    """Fill the parameters of this pipeline stage; returns their names, and whether the values are finite."""
    filled, finite = set(), True
    for target, part, piece in destinations:
        if is_pp_missing_parameter(target, model):
            continue  # it belongs to another pipeline stage
        if target == TIED_HEAD and target not in params:
            continue  # it is the embeddings' own parameter, except while vLLM reloads both
        param = params.get(target)
        # While vLLM loads weights again, they are as at first, and on no device.
        loading = param is not None and (param.is_meta or not update)
        if not loading and is_quantised(_base_layer(model.get_submodule(target.rpartition(".")[0]))):
            raise ValueError(
                f"The weight {target} cannot be written: it is quantised. Use the engine's reload_weights, or a "
                "weight update, which quantise what they load."
            )
        assert param is not None, target
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


def _base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer that adapters are added to, or the layer itself if there are none."""
    return layer.base_layer if isinstance(layer, BaseLayerWithLoRA) else layer


def _is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite, in one pass that needs no memory but for float8."""
    # The smallest and the largest number are not known of float8.
    low, high = (tensor.bfloat16() if tensor.itemsize == 1 and tensor.is_floating_point() else tensor).aminmax()
    return bool(low.isfinite() & high.isfinite())


def _folder(model_config: ModelConfig) -> Path:
    """Return the folder of the checkpoint's files."""
    if Path(model_config.model).is_dir():
        return Path(model_config.model)
    try:
        return Path(snapshot_download(model_config.model, revision=model_config.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return Path(model_config.model)
