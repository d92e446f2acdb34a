"""A checkpoint's files: what its config.json says, and where its weights are, what their headers say, and whether
they are whole.

Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

CHECKPOINT_FILES = ["model.safetensors", "model-*-of-*.safetensors", "*.safetensors"]
"""Where vLLM looks for weights, the first pattern with a match: other .safetensors files beside are left alone."""

INDEX = "model.safetensors.index.json"
"""Says in which file each tensor of a checkpoint in several files is."""


class Entry(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        file: where it is.
        dtype: in safetensors' words, such as "BF16".
        shape: its sizes.
        bytes: what it takes in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def size(self) -> int:
        """Number of its elements."""
        return prod(self.shape)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ValueError: it is none. The message names it, and what to do.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it again.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a checkpoint's config.json.

    Raises:
        ValueError: there is none, or it is not what it should be. The message names the file and the fix.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a checkpoint in the Hugging Face layout.")
    found = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ValueError(f"{path} names no model_type: copy the checkpoint's own config.json.")
    return found


def weight_files(folder: Path) -> list[Path]:
    """Return the files that vLLM would read, in order; none if there are no weights."""
    for pattern in CHECKPOINT_FILES:
        if found := sorted(folder.glob(pattern)):
            return found
    return []


def read_header(path: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file by name; only the header is read.

    Raises:
        ValueError: the file is not there, cut short, or no such file. The message names it, and what to do.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: put the checkpoint's file there.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
    try:
        tensors = {name: one for name, one in json.loads(header).items() if name != "__metadata__"}
        wanted = 8 + length + max((one["data_offsets"][1] for one in tensors.values()), default=0)
        found = {
            name: Entry(path, one["dtype"], tuple(one["shape"]), one["data_offsets"][1] - one["data_offsets"][0])
            for name, one in tensors.items()
        }
    except (ValueError, AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path} is cut short or no safetensors file: copy it again.") from None
    if wanted != size:
        raise ValueError(
            f"{path} is damaged: it has {size} bytes, and its header speaks of {wanted}. Copy it again."
        )
    return found


def damaged_files(folder: Path) -> Iterator[str]:
    """Yield a sentence for each file of weights, or index of such files, that is cut short or no such file."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            read_header(path)
        except ValueError as error:
            yield str(error)
    for path in sorted(folder.glob("*.safetensors.index.json")):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            yield f"{path} is cut short or no JSON file: copy it again."


def missing_files(folder: Path) -> Iterator[str]:
    """Yield a sentence for each file that the index names and that is not there, or one if there are no weights."""
    index = folder / INDEX
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
    except (ValueError, AttributeError, KeyError, TypeError):
        yield f"{index} is cut short or no index of safetensors files: copy it again."
        return
    for name in sorted(named):
        if not (folder / name).exists():
            yield f"{folder / name} is missing, and {INDEX} names it: copy it again."
    if not named and not weight_files(folder):
        yield f"{folder} has no .safetensors file: put the checkpoint's weights there."
