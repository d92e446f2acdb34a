"""The environment for vLLM's CPU build: defaults only, and the same in Python and in the shell."""

from __future__ import annotations

import re
import subprocess
import sys

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
