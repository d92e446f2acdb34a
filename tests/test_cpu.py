"""The environment for vLLM's CPU build: defaults only, and the same in Python and in the shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT
from vllm_fox.cpu import CPU_DEFAULTS, prepare_cpu_environment


def test_what_the_user_has_set_stays() -> None:
    environment = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}
    prepare_cpu_environment(environment, threads=1)
    assert environment == CPU_DEFAULTS | {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}
    environment = {}
    prepare_cpu_environment(environment, kv_cache_space=False)
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment and "OMP_NUM_THREADS" not in environment


def test_the_shell_script_exports_the_same() -> None:
    script = (ROOT / "examples" / "serve.sh").read_text()
    assert dict(re.findall(r"export (\w+)=\$\{\1:-(.*?)\}", script)) == CPU_DEFAULTS


def test_it_is_there_before_torch_and_vllm() -> None:
    """They read some of the variables while they are imported."""
    code = "import sys, vllm_fox.cpu; print(sorted({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "name, value",
    [("", ""), ("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")],
)
def test_freed_memory_is_kept(name: str, value: str) -> None:
    """Memory that was freed is used again without a page fault, unless the user has said otherwise.

    The setting lasts, so another process is asked.
    """
    code = """
import ctypes, resource
from vllm_fox.cpu import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        blocks = [libc.malloc(4 << 20) for _ in range(4)]
        for block in blocks:
            libc.memset(block, 1, 4 << 20)
        for block in blocks:
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_itself = faults()
keep_freed_memory()
faults()
print(by_itself, faults())
"""
    environment = os.environ | ({name: value} if name else {})
    environment.pop("LD_PRELOAD", None)  # vLLM may have named another allocator, for processes of its own
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    by_itself, kept = map(int, run.stdout.split())
    assert (kept < by_itself / 10) == (not name), run.stdout
