"""Host memory for cached pages: whether an engine may have it, before anything is loaded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .settings import PageSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the limit of a container in bytes, of both versions of cgroups."""


def check_host_cache(vllm_config: VllmConfig, settings: PageSettings, caching: bool) -> None:
    """Check the setting ``host_cache_gib``.

    Args:
        vllm_config: the engine's configuration.
        settings: the plugin's options.
        caching: whether prefix caching is on.

    Raises:
        ValueError: there is no cache to keep, or not so much memory.
    """
    wanted = settings.host_cache_gib
    if not wanted:
        return
    if not caching:
        raise ValueError(
            f"fox.host_cache_gib is {wanted:g}, but prefix caching is off, so there are no cached pages: leave it "
            "out."
        )
    engines = vllm_config.parallel_config.data_parallel_size_local
    available = available_bytes() / 2**30
    if engines * wanted > available:
        each = f" for each of {engines} engines" if engines > 1 else ""
        raise ValueError(
            f"fox.host_cache_gib is {wanted:g}{each}, but this machine has {available:.1f} GiB of host memory "
            "available: set it to less."
        )


def available_bytes() -> int:
    """Return the host memory that this process could take at most: what is free, or a container's limit."""
    limits = [int(text) for path in LIMITS if (text := _text_of(path)).isdigit()]
    free = re.findall(r"MemAvailable: *(\d+) kB", _text_of("/proc/meminfo"))
    return min([1024 * int(kibibytes) for kibibytes in free] + limits)


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
