"""Find a model on this machine."""

from __future__ import annotations

import re
from pathlib import Path

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
