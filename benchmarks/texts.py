"""Texts that benchmarks read: files as windows of tokens, and Python's standard library as files."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import refuse


def standard_library() -> list[Path]:
    """The modules of Python's standard library that are single files, in the order of their names."""
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def token_windows(
    tokenizer: Any, files: Iterable[Path], windows: int, context: int, source: str
) -> list[torch.Tensor]:
    """Windows [context] of the files' tokens, one after the other, at most so many.

    Args:
        source: what an error calls the files.

    Raises:
        Refused: there is too little text for one.
    """
    ids: list[int] = []
    for path in files:
        ids += tokenizer(path.read_text(), add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= windows * context:
            break
    found = min(windows, len(ids) // context)
    if not found:
        refuse(f"{source} has {len(ids)} tokens, less than --context {context}: give more text.")
    return list(torch.tensor(ids[: found * context]).view(found, context))
