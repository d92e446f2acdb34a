"""Settings that must stand before vLLM is imported, and fixtures that several modules share."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import ROOT
from tests.support.collector import give_imports_back, keep_imports_from_the_collector
from vllm_fox.cpu import prepare_cpu_environment

# The engine runs in the test's own process: still the real engine, scheduler and worker, but open to inspection.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
prepare_cpu_environment(threads=1)
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# A server closes connections that are idle for so many seconds, by default 5. A client that then uses one gets an
# error, and on a busy machine a test may be idle for longer than that.
os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "600")
# Seconds that Ray waits for its own first process, by default 20.
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "200")

# No example is too slow: on a busy machine any may be.
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")

LONGEST = (
    "kernels/test_interpreted.py",
    "families/fox/test_official_checkpoint.py",
    "engine/test_parallel.py",
    "examples/test_ray.py",
    "engine/test_serving.py",
    "engine/test_switches.py",
    "examples/test_retrofit.py",
    "families/evicting/test_serving.py",
    "examples/test_train_fox.py",
    "engine/test_data_parallel.py",
    "families/sparse_gpt2/test_serving.py",
    "families/fox/test_dialects.py",
    "engine/test_other_models.py",
)
"""The files that take longest. They come first, so that processes that share the files out end at the same time."""


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist would start with the files that have most tests, which are short ones.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    keep_imports_from_the_collector()


def pytest_unconfigure() -> None:
    give_imports_back()


@pytest.fixture(scope="session")
def fox_tiny() -> Path:
    """The shipped checkpoint."""
    return ROOT / "examples" / "fox-tiny"


@pytest.fixture(scope="session")
def dcp_tiny() -> Path:
    """The shipped checkpoint that drops tokens."""
    return ROOT / "examples" / "dcp-tiny"


@pytest.fixture(scope="session")
def fox_18m() -> Iterator[Path]:
    """A checkpoint by the official training code, with the official implementation's outputs, if it is at hand."""
    path = ROOT.parent / "shared" / "checkpoints" / "fox-pro-code-18m"
    if not (path / "model.safetensors").exists():
        pytest.skip("the official reference checkpoint fox-pro-code-18m is not beside this checkout")
    yield path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text: some modules of the standard library, and a file that is no text."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse", "ast", "bdb", "calendar", "cgi", "cmd", "codecs", "csv", "dis", "doctest", "enum"):
        source = Path(sysconfig.get_paths()["stdlib"], f"{name}.py")
        if source.exists():
            shutil.copy(source, folder)
    (folder / "image.bin").write_bytes(bytes(range(256)))
    return folder
