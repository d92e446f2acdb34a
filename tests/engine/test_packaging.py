"""What gets installed: everything the plugin needs, and no top-level module named ``kernels``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tests.support import ROOT

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def build(kind: str, source: Path, output: Path) -> Path:
    """Build a sdist or wheel of ``source`` with the environment's own setuptools (no network)."""
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(output)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sdist made from a copy of the tree, in which ``vllm_fox/kernels`` is a link as in git."""
    source = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE", "plugin_setup.py"):
        shutil.copy(ROOT / name, source / name)
    for name in ("vllm_fox", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    assert (source / "vllm_fox" / "kernels").is_symlink()
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that a user gets from the sdist."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_has_every_module_and_nothing_else(wheel: Path) -> None:
    folder = ROOT / "vllm_fox"
    modules = [p for p in (*folder.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"))]
    expected = {"plugin_setup.py", "vllm_fox/py.typed"}
    for path in modules:
        inside = path.relative_to(ROOT).as_posix()
        expected.add(f"vllm_fox/{inside}" if inside.startswith("kernels/") else inside)
    expected |= {path.relative_to(ROOT).as_posix() for path in (folder / "maps" / "page").iterdir()}
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
    required = [r for r in metadata.get_all("Requires-Dist") or [] if "extra ==" not in r]
    assert required == ["numpy", "pydantic>=2", "prometheus-client", "typer>=0.29"]
    assert "[console_scripts]\nvllm-fox = vllm_fox.cli.app:main" in entry_points
    assert set(metadata.get_all("Provides-Extra") or []) == {"cpu", "gpu", "ray", "train", "bench", "docs", "dev"}
    assert "Apache License" in licence


def test_an_installed_wheel_works_away_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import importlib.util as u, plugin_setup, vllm_fox.kernels.forgetting.decode\n"
        "import vllm_fox.kernels.forgetting.live_range\n"
        "from transformers import AutoConfig\n"
        "plugin_setup.register()\n"
        "plugin_setup.register()\n"
        "print(vllm_fox.kernels.forgetting.decode.__file__, plugin_setup.__file__)\n"
        "print(AutoConfig.for_model('forgetting_transformer').__class__.__module__)\n"
        "print(u.find_spec('kernels'))"
    )
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "site"), VLLM_LOGGING_LEVEL="ERROR")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    files, config, kernels = done.stdout.splitlines()[-3:]
    assert all(path.startswith(str(tmp_path / "site")) for path in files.split())
    assert config == "vllm_fox.families.fox.config"
    assert kernels == "None" or str(tmp_path) not in kernels


def test_the_folder_is_harmless_under_its_bare_name() -> None:
    """transformers imports whatever is called "kernels" on the path, which from a checkout is our folder."""
    code = "import kernels, sys; print([name for name in sys.modules if name.startswith('kernels.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
