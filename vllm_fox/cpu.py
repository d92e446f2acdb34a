"""Environment variables under which vLLM's CPU build suits a machine that does other work as well.

They are read when torch and vLLM are imported and when an engine starts, so call :func:`prepare_cpu_environment`
before. ``examples/serve.sh`` exports the same. On a GPU the two that begin with ``VLLM_CPU_`` have no effect.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import MutableMapping

KV_CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB of KV cache, which overrides ``--kv-cache-memory-bytes``."""

MALLOC_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": (-1, 1 << 29), "MALLOC_MMAP_THRESHOLD_": (-3, 1 << 25)}
"""Environment variables of glibc's allocator: the number of each in <malloc.h>, and the bytes that suit tensors."""

CPU_DEFAULTS = {
    # vLLM's own choice is most of the machine's memory.
    KV_CACHE_SPACE: "1",
    # Threads may run on all cores. vLLM's own choice binds them, and keeps some cores for its other processes,
    # which on a machine with two cores is one of them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads sleep while they wait. If they spin, they take the cores from vLLM's other processes.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""What :func:`prepare_cpu_environment` sets, and why."""


def prepare_cpu_environment(
    environment: MutableMapping[str, str] = os.environ,
    *,
    kv_cache_space: bool = True,
    threads: int | None = None,
) -> None:
    """Set :data:`CPU_DEFAULTS` where the user has not set something else.

    Args:
        environment: the one to change.
        kv_cache_space: whether to set the size of the KV cache, which else an engine's arguments can say.
        threads: of PyTorch, if given. Of a model as small as the shipped ones one thread computes the many small
            operators faster than several, and other work on the machine disturbs it less.
    """
    for name, value in CPU_DEFAULTS.items():
        if kv_cache_space or name != KV_CACHE_SPACE:
            environment.setdefault(name, value)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))


def keep_freed_memory() -> None:
    """Have glibc's allocator keep what tensors of less than 32 MiB have freed, for the tensors of the next layer.

    By itself it gives freed megabytes back to the system, which then hands them out again page by page, filled with
    zeros. That takes longer than what is computed in them. What an environment variable of the user says stays so,
    and other allocators are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    chosen = MALLOC_OPTIONS.keys() & os.environ.keys() or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if mallopt is not None and not chosen:
        for option, bytes_kept in MALLOC_OPTIONS.values():
            mallopt(option, bytes_kept)
