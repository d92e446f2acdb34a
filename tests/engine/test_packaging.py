"""What gets installed: everything the plugin needs, and no top-level module named ``kernels``.

The checks of an installed wheel are those of ``make release``. What needs a network or the tools of a release, such
as an environment with nothing else in it and the bill of materials, only ``make release`` does.
"""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.support import ROOT

FILES = (
    *("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"),
    *("plugin_setup.py", "pyproject.toml"),
)
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, output: Path) -> Path:
    """Build a sdist or wheel of ``source`` with the environment's own setuptools (no network)."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def release() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "release.py"), run_name="release")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, in which ``vllm_fox/kernels`` is a link as in git."""
    source = tmp_path_factory.mktemp("tree")
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    for name in ("vllm_fox", "kernels", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    assert (source / "vllm_fox" / "kernels").is_symlink()
    return source


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a user gets from the sdist."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_tree_and_its_sdist_give_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    assert contents(build("wheel", tree, tmp_path)) == contents(wheel)


def test_the_sdist_has_what_the_wheel_is_made_of_and_nothing_else(sdist: Path) -> None:
    """The kernels are in it as files, not as a link that leads out of the package."""
    with tarfile.open(sdist) as archive:
        members = [(Path(*Path(one.name).parts[1:]), one) for one in archive.getmembers()]
    made = {"", "PKG-INFO", "setup.cfg", "vllm_fox", "vllm_fox.egg-info"}
    assert {path.parts[0] if path.parts else "" for path, _ in members} == made | {*FILES}
    assert all(member.isfile() or member.isdir() for _, member in members)


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    folder = ROOT / "vllm_fox"
    modules = [p for p in (*folder.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"))]
    expected = {"plugin_setup.py", "vllm_fox/py.typed"}
    for path in modules:
        inside = path.relative_to(ROOT).as_posix()
        expected.add(f"vllm_fox/{inside}" if inside.startswith("kernels/") else inside)
    expected |= {path.relative_to(ROOT).as_posix() for path in (folder / "maps" / "page").iterdir()}
    for ending in ("cpp", "hpp"):
        expected |= {f"vllm_fox/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob(f"*.{ending}")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_announces_the_plugin_and_requires_no_vllm_by_itself(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert "[vllm.general_plugins]\nfox = plugin_setup:register" in entry_points
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [one for one in map(Requirement, metadata.get_all("Requires-Dist") or []) if one.marker is None]
    assert required == [Requirement(one) for one in project["dependencies"]]
    assert {one.name for one in required} == {"numpy", "pydantic", "prometheus-client", "typer"}
    assert "[console_scripts]\nvllm-fox = vllm_fox.cli.app:main" in entry_points
    assert set(metadata.get_all("Provides-Extra") or []) == {*project["optional-dependencies"]}
    assert "Apache License" in licence


def test_an_installed_wheel_works_away_from_the_tree(
    release: dict[str, Any], tree: Path, wheel: Path, tmp_path: Path
) -> None:
    """Then the same check fails for a file that differs, and for one that is missing."""
    python = release["install"](wheel, tmp_path / "env", "--no-deps", "--no-index")
    release["lend"](python, Path(sys.executable))
    release["check"](python, tree, "--vllm")
    code = (
        "import importlib.util as u, vllm_fox.kernels.forgetting.live_range\n"
        "print(vllm_fox.kernels.forgetting.live_range.__file__, u.find_spec('kernels'))"
    )
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, other = done.stdout.splitlines()[-1].split(maxsplit=1)
    assert Path(kernels).is_relative_to(tmp_path) and str(tmp_path) not in other
    (page,) = (tmp_path / "env").rglob("maps/page/app.js")
    page.write_text(page.read_text() + "\n")
    with pytest.raises(SystemExit, match="vllm_fox/maps/page/app.js is not as in the tree"):
        release["check"](python, tree)
    page.unlink()
    with pytest.raises(SystemExit, match=r"missing: \['vllm_fox/maps/page/app.js'\]; too much: \[\]"):
        release["check"](python, tree)


def test_sums_are_those_that_sha256sum_reads(release: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a b.whl").write_bytes(b"wheel")
    (tmp_path / "c.tar.gz").write_bytes(b"sdist")
    release["write_sums"](tmp_path)
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "a b.whl: OK\nc.tar.gz: OK\n", done.stderr
    (tmp_path / "c.tar.gz").write_bytes(b"another")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1


def test_a_release_is_in_the_changelog(release: dict[str, Any], tree: Path, tmp_path: Path) -> None:
    assert release["version_of"](tree) == release["version_of"](ROOT)
    (tmp_path / "vllm_fox").mkdir()
    (tmp_path / "vllm_fox" / "__init__.py").write_text('__version__ = "0.3.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0\n")
    with pytest.raises(SystemExit, match=r"says 0\.3\.0, and CHANGELOG\.md begins with 0\.2\.0"):
        release["version_of"](tmp_path)


def test_the_folder_is_harmless_under_its_bare_name() -> None:
    """transformers imports whatever is called "kernels" on the path, which from a checkout is our folder."""
    code = "import kernels, sys; print([name for name in sys.modules if name.startswith('kernels.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
