"""Find a model on this machine and read its config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .errors import CommandError


def folder_of(model: str) -> Path:
    """Return the folder of a model: the one named, or the one in the cache of the Hugging Face hub.

    Nothing is downloaded.

    Raises:
        CommandError: there is no such folder.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CommandError(f"MODEL is {model}, which is a file: give the folder that it is in.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(model, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise CommandError(
                f"MODEL is {model}, which is neither a folder nor in the Hugging Face cache: give a folder, or "
                f"download it by `hf download {model}`."
            ) from None
    raise CommandError(f"MODEL is {model}, which is no folder: give the folder of a checkpoint.")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a checkpoint's config.json.

    Raises:
        ValueError: there is none, or it is not what it should be. The message names the file and the fix.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a checkpoint in the Hugging Face layout.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): copy it again.") from None
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ValueError(f"{path} names no model_type: copy the checkpoint's own config.json.")
    return found
