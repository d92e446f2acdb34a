"""The program around the commands: fast to start, and one sentence for every mistake."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import ROOT
from vllm_fox.cli.app import COMMANDS, app, spread

from .conftest import Run


def test_help_needs_neither_torch_nor_vllm() -> None:
    """They take seconds to import, so nothing imports them before a command does."""
    code = (
        "import sys; from vllm_fox.cli.app import main; main(['--help']); main(['top', '--help'])\n"
        "heavy = {'torch', 'vllm', 'transformers', 'numpy', 'safetensors', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "vllm_fox.cli", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("vllm-fox ")


def test_every_command_is_named() -> None:
    assert tuple(command.callback.__name__ for command in app.registered_commands if command.callback) == COMMANDS


def test_help(run: Run) -> None:
    for words in ([], ["--help"]):
        whole = run(*words)
        assert whole.code == 0 and not whole.err
        assert all(f"\n  {name} " in whole.out for name in COMMANDS) and "Exit codes: 0" in whole.out
    for name in COMMANDS:
        one = run(name, "--help")
        assert one.code == 0 and f"Usage: vllm-fox {name} " in one.out and "--help" in one.out


@pytest.mark.parametrize(
    "words, parts",
    [
        (["inspct"], ["'inspct'", "'inspect'"]),
        (["inspect"], ["MODEL", "`vllm-fox inspect --help`"]),
        (["inspect", "nowhere"], ["MODEL is nowhere", "no folder", "give the folder"]),
        (["inspect", "no/where"], ["MODEL is no/where", "cache", "hf download no/where"]),
        (["inspect", "x", "--token", "3"], ["--token", "--tokens"]),
        (["inspect", "x", "--tokens", "0"], ["--tokens is 0", "from 1 to"]),
        (["inspect", "x", "--tokens", "many"], ["--tokens is many", "whole number"]),
        (["inspect", "x", "--memory", "nan"], ["--memory is nan", "such as 80"]),
        (["inspect", "x", "--dtype", "fp8"], ["--dtype is fp8", "bfloat16, float16, float32"]),
        (["inspect", "x", "--max-model-len", "-1"], ["--max-model-len is -1", "from 1"]),
        (["doctor", "--port", "70000"], ["--port is 70000", "1 to 65535"]),
        (["doctor", "--device", "tpu"], ["--device is tpu", "auto, cpu, gpu"]),
        (["convert", "here"], ["OUT", "`vllm-fox convert --help`"]),
        (["convert", "a", "b", "--window", "0"], ["--window is 0", "from 1"]),
        (["convert", "a", "b", "--threshold", "low"], ["--threshold is low", "such as -4"]),
        (["top"], ["URL", "`vllm-fox top --help`"]),
        (["top", "ftp://host"], ["URL is ftp://host", "http://localhost:8000"]),
        (["top", "http://[x"], ["URL is http://[x", "http://localhost:8000"]),
        (["top", "localhost:99999"], ["URL is localhost:99999", "http://localhost:8000"]),
        (["top", "localhost", "--interval", "0"], ["--interval is 0", "such as 2"]),
    ],
)
def test_a_mistake_is_one_sentence(run: Run, words: list[str], parts: list[str]) -> None:
    done = run(*words)
    assert done.code == 2 and not done.out
    assert done.err.count("\n") == 1 and done.err.endswith(".\n")
    assert all(part in done.err for part in parts), done.err


def test_an_option_takes_several_numbers() -> None:
    assert spread(["a", "--tokens", "1", "2", "b"], "--tokens") == ["a", "--tokens", "1", "--tokens", "2", "b"]
    assert spread(["--tokens", "1", "--tokens", "2", "3"], "--tokens") == [
        "--tokens",
        "1",
        *["--tokens", "2"],
        "--tokens",
        "3",
    ]
    assert spread(["--port", "1", "2"], "--tokens") == ["--port", "1", "2"]
    assert spread(["a", "--tokens", "1", "--", "2", "--tokens", "3", "4"], "--tokens")[3:] == [
        "--",
        "2",
        "--tokens",
        "3",
        "4",
    ]
