"""Bounds in pyproject.toml, the pinned versions in .ci/constraints, and how they are written and installed."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[Requirement]] = {
    name: [Requirement(one) for one in requirements]
    for name, requirements in PROJECT["project"]["optional-dependencies"].items()
}
PLAIN = [Requirement(one) for one in PROJECT["project"]["dependencies"]]
BUILD = [Requirement(one) for one in PROJECT["build-system"]["requires"]]
PINNED = {"cpu": ("cpu", "dev"), "docs": ("docs",), "release": ("release",)}
"""Files of .ci/constraints, and the extras that they are for."""


def direct(*extras: str) -> list[Requirement]:
    """What the project with some extras asks for itself; its extras may name others."""
    found = [*PLAIN]
    for requirement in (one for extra in extras for one in EXTRAS[extra]):
        found += direct(*requirement.extras) if requirement.name == "vllm-fox" else [requirement]
    return found


def pins(path: Path) -> dict[str, str]:
    lines = path.read_text().splitlines()
    assert re.fullmatch(r"# Python 3\.\d+ \w+ \w+", lines[0])
    found = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(found) == sorted(found)
    return found


def test_every_requirement_has_a_lower_and_an_upper_bound() -> None:
    for requirement in {*BUILD, *direct(*EXTRAS)}:
        assert sorted(one.operator for one in requirement.specifier) == ["<", ">="], str(requirement)


@pytest.mark.parametrize("name", PINNED)
def test_pins_are_within_the_bounds(name: str) -> None:
    found = pins(ROOT / ".ci" / "constraints" / f"{name}.txt")
    for requirement in direct(*PINNED[name]):
        assert found[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)
    assert all(Version(one).local is None for one in found.values())


def test_there_are_no_other_files_of_pins() -> None:
    assert {path.stem for path in (ROOT / ".ci" / "constraints").iterdir()} == PINNED.keys()


def test_what_is_installed_is_written_down(tmp_path: Path) -> None:
    """With what it needs in turn: pytest needs pluggy. The CPU build's torch has a local version."""
    path = tmp_path / "pins.txt"
    extras = ("cpu" if "+cpu" in version("torch") else "gpu", "dev")
    subprocess.run([sys.executable, ROOT / ".ci" / "lock.py", path, *extras], check=True)
    found = pins(path)
    assert {canonicalize_name(one.name) for one in direct(*extras)} < found.keys()
    assert "vllm-fox" not in found and "mkdocs" not in found
    for name in ("pytest", "pluggy", "torch"):
        assert found[name] == Version(version(name)).public


def small_wheel(folder: Path, name: str, release: str) -> None:
    info = f"{name}-{release}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{release}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True, with_pip=True)
    return folder


@pytest.mark.parametrize(
    ("lock", "header", "pin", "installed", "said"),
    [
        ("1", "", "==1", "1", ""),
        ("", "", "==1", "2", ""),
        ("0", "", "==1", "2", ""),
        ("1", "# Python 2.7 Linux x86_64", "==1", "2", "has no versions for this environment"),
        ("1", "", "==3", "2", "pip cannot install the versions of"),
        ("yes", "", "==1", None, "LOCK is 'yes': give 1"),
    ],
)
def test_pins_are_installed_where_they_fit(
    environment: Path, tmp_path: Path, lock: str, header: str, pin: str, installed: str | None, said: str
) -> None:
    for release in ("1", "2"):
        small_wheel(tmp_path, "fox_test_package", release)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "fox_test_package"], capture_output=True)
    own = f"# Python {sys.version_info.major}.{sys.version_info.minor} {platform.system()} {platform.machine()}"
    (tmp_path / "pins.txt").write_text(f"{header or own}\nfox-test-package{pin}\n")
    command = [ROOT / ".ci" / "install.sh", environment, tmp_path / "pins.txt", "fox-test-package"]
    variables = {**os.environ, "LOCK": lock, "PIP_ARGS": f"--no-index --find-links {tmp_path}"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert said in done.stderr and bool(said) == bool(done.stderr), done.stderr
    assert (done.returncode == 0) == (installed is not None)
    if installed is not None:
        code = "from importlib.metadata import version; print(version('fox-test-package'))"
        assert subprocess.check_output([python, "-c", code], text=True).strip() == installed
