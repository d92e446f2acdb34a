"""The leaf functions in C++, and what runs where there is no compiler.

The other tests of this folder hold against the formula what runs by default, which is C++ on a CPU.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.one_layer import OneLayer, StepInputs, batch_of, extend, pool_and_table
from tests.support import ROOT
from tests.support.harness import random_inputs
from vllm_fox.kernels import native
from vllm_fox.kernels.forgetting.decode import cpu, reference
from vllm_fox.kernels.paged import Batch
from vllm_fox.kernels.subset.attention import cpu as subset_cpu
from vllm_fox.kernels.subset.attention import reference as subset_reference
from vllm_fox.kernels.subset.pages import Evictions, SubsetPageFormat
from vllm_fox.kernels.subset.write import subset_write

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="for a CPU"
)


@pytest.fixture(autouse=True)
def arithmetic_is_given_back() -> Iterator[None]:
    """Numbers below 2**-126 are zero in C++, and not behind it."""
    yield
    assert (torch.full((8,), 1e-39) / 2 > 0).all()


def test_a_compiler_is_there() -> None:
    """Else the other tests would hold plain PyTorch against the formula twice."""
    assert native.can_compile()


@pytest.mark.parametrize("file, least", [("test_forgetting.py", 60), ("test_subset.py", 60)])
def test_plain_pytorch_without_a_compiler(file: str, least: int) -> None:
    """The leaf-function tests once more, in a process of its own: what runs is decided once."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", f"tests/kernels/{file}"],
        cwd=ROOT,
        env=os.environ | {native.COMPILER: ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    summary = run.stdout.strip().splitlines()[-1]
    assert int(summary.split(" passed")[0].split()[-1]) >= least, summary


@pytest.mark.parametrize(
    "compiler, said, works",
    [
        ("", "", False),
        ("nosuch", "VLLM_FOX_CXX is 'nosuch', which is not on PATH", False),
        ("false", "runs in plain PyTorch, since", False),
        ("g++", "", True),
    ],
)
def test_a_compiler_that_fails_is_done_without(compiler: str, said: str, works: bool, tmp_path: Path) -> None:
    """With an empty cache. A sentence says why, unless the user has asked for none."""
    code = "from vllm_fox.kernels.native import can_compile; print(can_compile())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {native.COMPILER: compiler, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str(works)
    assert said in run.stderr and bool(run.stderr) == bool(said)
    assert bool(list(tmp_path.glob("vllm-fox/*.so"))) == works


def test_no_compiler_at_all_is_done_without(tmp_path: Path) -> None:
    code = "from vllm_fox.kernels.native import can_compile; print(can_compile())"
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", native.COMPILER)}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "False"
    assert "No C++ compiler was found" in run.stderr


def test_a_cache_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = "from vllm_fox.kernels.native import can_compile; print(can_compile())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "True"


def test_a_source_that_does_not_compile_is_one_sentence(tmp_path: Path) -> None:
    """Though the compiler works: with what it said, and what to do."""
    (tmp_path / "cpu.cpp").write_text("#error out of luck")
    with pytest.raises(RuntimeError, match=r"cannot compile .*out of luck[\s\S]*or set VLLM_FOX_CXX to another"):
        native.function("run", str(tmp_path / "cpu.py"), torch.float32)


def test_a_torn_file_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name of a whole one, in another folder, since a file of the same path is not read twice."""
    (tmp_path / "cpu.cpp").write_text('extern "C" int seven() { return 7; }')
    for folder in (tmp_path / "whole", tmp_path / "torn"):
        folder.mkdir()
        monkeypatch.setattr(native, "_folder", lambda folder=folder: folder)
        for whole in tmp_path.glob("whole/*.so"):
            (folder / whole.name).write_bytes(b"\x7fELF")
        native._library.cache_clear()
        assert native.function("seven", str(tmp_path / "cpu.py"), torch.float32)() == 7
    assert [file.name for file in tmp_path.glob("torn/*.so")] == [file.name for file in tmp_path.glob("whole/*.so")]


def decoding(lengths: list[int], dtype: torch.dtype) -> tuple[OneLayer, StepInputs, Batch]:
    """A layer whose requests of these lengths have one query each, all of it before attention done."""
    layer = OneLayer(heads=3, groups=2, dtype=dtype, shift=True, threshold=-60.0, num_slots=8)
    slots = [layer.open() for _ in lengths]
    for slot, length in zip(slots, lengths, strict=True):
        if length > 1:
            layer.step([(slot, random_inputs(length - 1, heads=3, groups=2, shift=True, seed=length))])
    last = [(slot, random_inputs(1, heads=3, groups=2, shift=True, seed=slot)) for slot in slots]
    inputs, batch = layer.prepare(last)
    out = torch.empty_like(inputs.q)
    layer.impl.forward(inputs.flat(), batch, layer.state, out.flatten(1))
    return layer, inputs, batch


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("lengths", [[1], [40], [200, 1, 17, 16, 64, 200]])
@pytest.mark.parametrize("live", ["pruned", "newest page only", "more dead than there is"])
def test_decode_equals_plain_pytorch(live: str, lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    """One request and ragged ones.

    The sums are float32 in both. Outputs in bfloat16 are rounded by 2**-9 at most, so they differ by 2**-8 at most.
    """
    layer, inputs, batch = decoding(lengths, dtype)
    if live != "pruned":
        beyond = 1000 if live == "more dead than there is" else 0
        for slot, length in layer.lengths.items():
            layer.table.first_live[slot] = (length - 1) // layer.page_size + beyond
    given, expected = (torch.full_like(inputs.q, float("nan")) for _ in range(2))
    for run, out in ((cpu, given), (reference, expected)):
        run.decode_attention(layer.pages, layer.table, batch, 0, inputs.q, layer.impl.scale, out, None)
    assert (given.double() - expected.double()).norm() < tolerance * expected.double().norm()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_prompt_keeps_a_nan(wrong: float) -> None:
    """Also where it is the only one of the first keys that a query still sees."""
    length, size = 130, 16
    form = SubsetPageFormat(size, 1, 32, 0, torch.float32, torch.float32)
    pages = form.view(torch.zeros(100 * form.page_bytes, dtype=torch.uint8))
    pool, table = pool_and_table(1, 1, 100, 32, "cpu")
    slot = pool.open()
    table.first_live[slot] = 0
    extend(pool, table, slot, length, size)
    batch = batch_of([length], [length], [slot], size, "cpu")
    q, (k, v) = torch.randn(length, 1, 1, 1, 32), torch.randn(2, length, 1, 1, 32)
    k[0] = wrong
    evicted = torch.zeros(length, 1, dtype=torch.bool)
    evicted[1:64] = True
    subset_write(pages, table, batch, 0, k=k, v=v, int_k=None, evictions=Evictions(evicted, 1, 0))
    given, expected = torch.zeros_like(q), torch.zeros_like(q)
    for run, out in ((subset_cpu, given), (subset_reference, expected)):
        run.subset_attention(pages, table, batch, 0, q, 32**-0.5, out, None)
    assert expected.isnan().all()
    assert given.isnan().all()


def faint(length: int) -> dict[str, torch.Tensor]:
    """Inputs of one head whose first token alone has a value, 2**-40, and 2**-100 of the weight of any other."""
    q, k, v = (torch.zeros(length, 1, 32) for _ in range(3))
    q[..., 0] = 1.0
    k[0, 0, 0] = -100 * math.log(2) * 32**0.5
    v[0] = 2.0**-40
    return {"q": q[:, :, None], "k": k, "v": v, "log_f": torch.zeros(length, 1, 1)}


def attended(family: str, parts: list[int]) -> list[torch.Tensor]:
    """What attention gives for the faint inputs, read in parts of so many tokens."""
    data, size, length = faint(sum(parts)), 16, sum(parts)
    pieces = list(zip(*(x.split(parts) for x in data.values()), strict=True))
    if family == "forgetting":
        layer = OneLayer(heads=1, page_size=size)
        slot = layer.open()
        return [layer.step([(slot, dict(zip(data, piece, strict=True)))])[0] for piece in pieces]
    form = SubsetPageFormat(size, 1, 32, 0, torch.float32, torch.float32)
    pages = form.view(torch.zeros(100 * form.page_bytes, dtype=torch.uint8))
    pool, table = pool_and_table(1, 1, 100, 32, "cpu")
    slot, end, outs = pool.open(), 0, []
    table.first_live[slot] = 0
    extend(pool, table, slot, length, size)
    for (q, k, v, _), new in zip(pieces, parts, strict=True):
        end += new
        batch = batch_of([new], [end], [slot], size, "cpu")
        keep = Evictions(torch.zeros(new, 1, dtype=torch.bool), 1, 0)
        subset_write(pages, table, batch, 0, k=k[:, None], v=v[:, None], int_k=None, evictions=keep)
        outs.append(torch.full_like(q[:, None], float("nan")))
        subset_cpu.subset_attention(pages, table, batch, 0, q[:, None].contiguous(), 32**-0.5, outs[-1], None)
    return outs


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere such numbers are as fast as others")
@pytest.mark.parametrize("family", ["forgetting", "subset"])
def test_numbers_below_the_normal_ones_are_zero(family: str) -> None:
    """In prompts and in decode. An Intel processor takes a hundred cycles for each of them."""
    parts = [40, 1]
    data = faint(sum(parts))
    weights = (
        (data["q"][:, 0, 0] @ data["k"][:, 0].T * 32**-0.5)
        .masked_fill(torch.ones(sum(parts), sum(parts)).triu(1).bool(), -torch.inf)
        .softmax(-1)
    )
    expected = (weights @ data["v"][:, 0]).split(parts)
    assert all((want[-1] > 0).all() and (want[-1] < 2.0**-126).all() for want in expected)
    prompt, single = attended(family, parts)
    assert (prompt[1:] == 0).all() and (single == 0).all()
