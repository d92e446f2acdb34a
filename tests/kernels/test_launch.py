"""Launching compiled kernels without binding their arguments anew, and doing without it where Triton does not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vllm_fox.kernels.common import take_turn
from vllm_fox.kernels.launch import Launcher, compiled_kernels_can_be_launched, starts_early

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CPU = torch.device("cpu")


@triton.jit(do_not_specialize=["number"])
def _line(out, number, stride, CONSTANT: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out + program * stride, number * CONSTANT + program)


@triton.jit
def _after(before, out, EARLY: tl.constexpr):
    take_turn(EARLY)
    # The later a program writes, the sooner a kernel that did not wait for it would be found out.
    at = (tl.num_programs(0) - 1 - tl.program_id(0)) * 128 + tl.arange(0, 128)
    tl.store(out + at, tl.load(before + tl.num_programs(0) * 128 - 1 - at) + 1)


class Compiled:
    """What a Triton kernel is compiled to, as :class:`Launcher` uses it, in Python. ``wrong`` is how it fails."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong, self.launches = wrong, 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(out: torch.Tensor, number: int, stride: int, *constants: int) -> None:
            self.launches += 1
            if self.wrong == "refuses constants" and constants:
                raise TypeError("takes 3 arguments but 4 were given")
            if self.wrong == "keeps the first number":
                number = 1
            for program in range(grid[0]):
                out[program * stride] = number * constants[0] + program

        return launch


class Function:
    """What ``@triton.jit`` makes."""

    def __init__(self, wrong: str = "") -> None:
        self.compiled, self.bound = Compiled(wrong), 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Compiled:
            self.bound += 1
            Compiled()[grid](*arguments)
            return self.compiled

        return launch


def launch_thrice(launcher: Launcher, device: torch.device) -> None:
    out = torch.zeros(8, dtype=torch.int32, device=device)
    for number in (3, 5, 6):
        launcher((2, 1, 1), (out,), (number,), (4,), (10,))
        assert out.tolist() == [10 * number, 0, 0, 0, 10 * number + 1, 0, 0, 0]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a trial kernel decide, and forgets what was found out about the real one."""

    def use(trial: Any) -> None:
        monkeypatch.setattr(
            "vllm_fox.kernels.launch.compiled_kernels_can_be_launched",
            lambda device: compiled_kernels_can_be_launched.__wrapped__(device, trial),
        )

    return use


def test_compiled_once_and_launched_often(trials: Any) -> None:
    trials(Function())
    function = Function()
    launch_thrice(Launcher(function), CPU)
    assert (function.bound, function.compiled.launches) == (1, 2)


@pytest.mark.parametrize("wrong", ["refuses constants", "keeps the first number"])
def test_a_triton_that_launches_otherwise(trials: Any, wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every launch binds its arguments, and the log says so."""
    trials(Function(wrong))
    function = Function(wrong)
    with caplog.at_level(logging.WARNING, "vllm_fox.kernels.launch"):
        launch_thrice(Launcher(function), CPU)
    assert (function.bound, function.compiled.launches) == (3, 0)
    assert "launches compiled kernels otherwise than expected" in caplog.text


def test_unaligned_tensors_are_bound(trials: Any) -> None:
    """Triton compiles other loads for them."""
    trials(Function())
    function = Function()
    launcher = Launcher(function)
    launch_thrice(launcher, CPU)
    out = torch.zeros(9, dtype=torch.int32)[1:]
    launcher((1, 1, 1), (out,), (3,), (4,), (10,))
    assert function.bound == 2 and out[0] == 30


@needs_gpu
def test_this_triton_launches_compiled_kernels() -> None:
    assert compiled_kernels_can_be_launched(torch.device("cuda", torch.cuda.current_device()))


def test_a_real_kernel() -> None:
    """On a GPU, and in the interpreter, which compiles nothing."""
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("needs a CUDA GPU, or Triton's interpreter")
    launcher = Launcher(_line)
    launch_thrice(launcher, torch.device("cuda") if torch.cuda.is_available() else CPU)
    assert bool(launcher._compiled) == torch.cuda.is_available()


def test_early_kernels_wait_for_each_other() -> None:
    """Each of a line of kernels reads what the one before it has written, started early where the device can."""
    if not torch.cuda.is_available() and not triton.knobs.runtime.interpret:
        pytest.skip("needs a CUDA GPU, or Triton's interpreter")
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    programs, kernels = (2000, 100) if torch.cuda.is_available() else (2, 3)
    launcher = Launcher(_after, early=True)
    buffers = torch.zeros(kernels + 1, programs * 128, dtype=torch.int32, device=device)

    def line() -> None:
        for number, (before, out) in enumerate(zip(buffers, buffers[1:])):
            if number % 5 == 1:
                torch.add(before, 1, out=out)  # a kernel that knows nothing of it
            else:
                launcher((programs, 1, 1), (before, out), (), (), ())

    line()
    assert (buffers == torch.arange(kernels + 1, device=device)[:, None]).all()
    if not torch.cuda.is_available():
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        line()
    for start in (7, 100):
        buffers[0] = start
        graph.replay()
        assert (buffers == start + torch.arange(kernels + 1, device=device)[:, None]).all()


def test_what_starts_early() -> None:
    assert not starts_early(CPU)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        assert starts_early(device) == (torch.cuda.get_device_capability(device) >= (9, 0))
