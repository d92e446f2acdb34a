"""Leaf functions in C++ for a CPU: how they are compiled, and how they are given tensors.

A step of few requests is some hundred operations of PyTorch, each of which takes longer to start than to compute. A
function in C++ is one call, and it reads pages where they are instead of gathering them. The sources are compiled
on the machine that runs them, for its processor and for the sizes of a model, and kept in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

COMPILER = "VLLM_FOX_CXX"
"""Environment variable that names the C++ compiler, or none if it is empty. By default it is the first that is
found of ``CXX`` and :data:`COMPILERS`."""

COMPILERS = ("g++", "clang++")

NUMBERS = {torch.float32: "float", torch.bfloat16: "uint16_t"}
"""Formats of stored numbers that the sources know, and their types there. Others are left to plain PyTorch."""

# Sums may be reordered. NaN and infinity stay what they are.
FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno",
    "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math",
]  # fmt: skip
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # for some processors compilers choose narrower vectors

ROOT = Path(__file__).resolve().parent


@cache
def can_compile() -> bool:
    """Whether there is a compiler that compiles what all sources include. If not, plain PyTorch runs."""
    if _compiler() is None:
        chosen = os.environ.get(COMPILER)
        if chosen is None:
            logger.warning(
                "No C++ compiler was found, so attention on this CPU runs in plain PyTorch: install g++."
            )
        elif chosen:
            logger.warning(
                "%s is %r, which is not on PATH, so attention on this CPU runs in plain PyTorch: name a compiler "
                "that is there.",
                COMPILER,
                chosen,
            )
        else:
            logger.info("Attention on this CPU runs in plain PyTorch, since %s is empty.", COMPILER)
        return False
    try:
        _load(ROOT / "common.hpp", ("-x", "c++", "-DNUMBER=float"))
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("Attention on this CPU runs in plain PyTorch, since %s fails: %s", _compiler(), _said(error))
        return False
    return True


def knows(first: object) -> bool:
    """Whether the sources know the numbers that a leaf function's first argument stores."""
    return getattr(first, "dtype", None) in NUMBERS


def function(name: str, beside: str, dtype: torch.dtype, **sizes: int) -> Callable[..., None]:
    """The function ``name`` of the ``cpu.cpp`` beside a file, for stored numbers of a dtype and given sizes.

    Raises:
        RuntimeError: the file cannot be compiled or loaded, though others can: the disk is full, say.
    """
    found: Callable[..., None] = getattr(_library(beside, NUMBERS[dtype], tuple(sizes.items())), name)
    return found


@cache
def _library(beside: str, number: str, sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    source = Path(beside).with_name("cpu.cpp")
    defines = [f"-DNUMBER={number}", *(f"-D{name}={size}" for name, size in sizes)]
    try:
        return _load(source, tuple(defines))
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{_compiler()} cannot compile {source} into {_folder()}: {_said(error)} Mend that, or set {COMPILER} "
            "to another compiler, or to nothing for attention in plain PyTorch."
        ) from None


@cache
def _compiler() -> str | None:
    chosen = os.environ.get(COMPILER)
    names = COMPILERS if chosen is None else (chosen,)
    if chosen is None and "CXX" in os.environ:
        names = (os.environ["CXX"], *names)
    return next((found for name in names if name and (found := shutil.which(name))), None)


@cache
def _machine() -> str:
    """What a compiled file depends on besides its source: the processor and the compiler."""
    compiler = _compiler()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    try:
        about = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        about = [platform.processor()]
    kinds = ("flags", "features", "model name", "cpu part", "cpu implementer")
    processor = [line for line in about if line.lower().startswith(kinds)]
    return "\n".join([platform.machine(), version, *(processor or about)])


@cache
def _folder() -> Path:
    """Where compiled files are kept: a folder of the user's, or of this process if that cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "vllm-fox"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="vllm-fox-"))


def _load(source: Path, arguments: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a source, which is compiled if that has not been done yet."""
    read = [source, *sorted(ROOT.rglob("*.hpp"))]
    key = hashlib.sha256()
    for part in (_machine(), *FLAGS, *arguments, *(path.read_text() for path in read)):
        key.update(part.encode() + b"\0")
    target = _folder() / f"{key.hexdigest()[:32]}.so"
    if target.exists():
        with contextlib.suppress(OSError):  # a power cut has torn it: it is compiled anew
            return ctypes.CDLL(str(target))
    compiler = _compiler()
    assert compiler is not None
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / target.name
        command = [compiler, *FLAGS, *arguments, str(source), "-o", str(new)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        new.rename(target)
    return ctypes.CDLL(str(target))


def _said(error: OSError | subprocess.CalledProcessError) -> str:
    return (getattr(error, "stderr", None) or str(error)).strip()


class Part(ctypes.Structure):
    """``Part`` of common.hpp: a view [P, ...] of the pages."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64)]

    @classmethod
    def of(cls, pages: torch.Tensor | None) -> Part:
        return cls(None, 0) if pages is None else cls(pages.data_ptr(), pages.stride(0))


class Tensors(ctypes.Structure):
    """A structure of pointers into tensors, which it keeps."""

    @classmethod
    def keeping(cls, *values: Any) -> Any:
        """Fill the fields in order; a tensor, which is contiguous, gives its address."""
        filled = cls(*(_address(x) if isinstance(x, torch.Tensor) else x for x in values))
        filled.kept_tensors = [x for x in values if isinstance(x, torch.Tensor)]
        return filled


class NativeTable(Tensors):
    """``Table`` of common.hpp."""

    _fields_ = [
        ("chunk_of", ctypes.c_void_p),
        ("chunks", ctypes.c_int64),
        ("entries", ctypes.c_void_p),
        ("streams", ctypes.c_int64),
        ("first_live", ctypes.c_void_p),
    ]


class NativeBatch(Tensors):
    """``Batch`` of common.hpp."""

    _fields_ = [
        ("starts", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
    ]


def call(run: Callable[..., None], *values: Any) -> None:
    """Call a function of C++ with structures, contiguous tensors, numbers, and None for a null pointer."""
    run(*(_argument(x) for x in values))


def _argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return ctypes.c_void_p(_address(x))
    if isinstance(x, ctypes.Structure):
        return ctypes.byref(x)
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_int64(x) if isinstance(x, int) else x


def _address(x: torch.Tensor) -> int:
    assert x.is_contiguous()
    return x.data_ptr()
