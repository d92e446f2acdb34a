"""The Triton kernels without a GPU: the leaf-function tests once more, under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from xml.etree import ElementTree

import pytest
import torch

from tests.support import ROOT

FILES = {
    "test_forgetting": 30,
    "test_subset": 8,
    "test_fading": 8,
    "test_page_copy": 9,
    "test_gated_mlp": 37,
    "test_rms_norm": 40,
    "test_training": 20,
}
"""So many tests at least of each file run and pass."""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels themselves run on this machine's GPU"
)


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Counter[str]:
    """How many tests of each file pass; none may fail.

    In a process of its own, since Triton reads TRITON_INTERPRET when kernels are defined. One for all
    files, since it takes seconds to import what they need.
    """
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    files = [f"tests/kernels/{name}.py" for name in FILES]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", f"--junitxml={report}", *files],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    tests = ElementTree.parse(report).iter("testcase")
    return Counter(test.attrib["classname"].rpartition(".")[2] for test in tests if not len(test))


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(name: str, passed: Counter[str]) -> None:
    assert passed[name] >= FILES[name], passed
