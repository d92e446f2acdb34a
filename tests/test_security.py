"""What SECURITY.md says of the code: nothing that is read becomes code."""

from __future__ import annotations

import ast
import re
from importlib import import_module

import pytest

from tests.support import ROOT
from vllm_fox.checkpoint_files import CHECKPOINT_FILES
from vllm_fox.families import FAMILIES

UNPICKLE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
MODULES = [path for name in ("vllm_fox", "kernels", "examples") for path in sorted((ROOT / name).rglob("*.py"))]
ARCHITECTURES = {path for family in FAMILIES for path in family.architectures.values()}


def dangers(source: str) -> set[str]:
    """What a module uses that makes code of data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLE}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLE:
            found.add(str(node.module))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            found |= {called} & {"eval", "exec", "torch.load"}
            found |= {str(keyword.arg) for keyword in node.keywords if keyword.arg == "trust_remote_code"}
    return found


def test_no_module_makes_code_of_data() -> None:
    assert len(MODULES) > 100
    assert {path.name: found for path in MODULES if (found := dangers(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import load",
        "torch.load(f, weights_only=True)",
        "eval(text)",
        "f(trust_remote_code=x)",
    ],
)
def test_what_would_be_found(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_vllm_model_reads_safetensors_only(architecture: str) -> None:
    module, _, name = architecture.partition(":")
    patterns = getattr(import_module(module), name).allow_patterns_overrides
    assert patterns == CHECKPOINT_FILES and all(pattern.endswith(".safetensors") for pattern in patterns)


def test_the_files_and_tests_that_it_names_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    names = re.findall(r"`((?:tests|examples)/[\w/.-]+)(?:::(\w+))?`", text)
    assert len(names) > 5
    for path, test in names:
        assert f"def {test}(" in (ROOT / path).read_text() if test else (ROOT / path).exists(), path
