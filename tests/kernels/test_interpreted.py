"""The Triton kernels without a GPU: the leaf-function tests once more, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run on this machine's GPU")
@pytest.mark.parametrize(
    "file, least",
    [
        ("test_forgetting.py", 30),
        ("test_subset.py", 8),
        ("test_fading.py", 8),
        ("test_page_copy.py", 9),
        ("test_training.py", 20),
    ],
)
def test_kernels_under_the_interpreter(file: str, least: int) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when kernels are defined."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", f"tests/kernels/{file}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= least, summary
