"""Shell commands in the docs: each is run by a test, or it is said what it needs; and each option is known."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import typer.main

from tests.support import ROOT
from tests.support.command_lines import parser_of
from tests.support.shell_commands import Command, commands_in
from vllm_fox.cli.app import app

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMANDS = [(page, command) for page in PAGES for command in commands_in(page.read_text())]
RUN = {
    "examples/serve.sh": ("tests/test_docs_commands.py", "serve.sh"),
    "make docs": (".ci/run", "make docs"),
    "make setup": ("Makefile", "test: setup"),
    "make test": (".ci/run", "make test"),
    "pytest": ("Makefile", "-m pytest"),
    "python -c": ("tests/external/test_lm_eval.py", "cli_evaluate"),
    "python -m benchmarks.bound": ("tests/benchmarks/test_bound.py", "bound.main()"),
    "python -m benchmarks.cached_pages": ("tests/benchmarks/test_cached_pages.py", "cached_pages.main()"),
    "python -m benchmarks.capacity": ("tests/benchmarks/test_capacity.py", "capacity.main()"),
    "python -m benchmarks.chat": ("tests/benchmarks/test_chat.py", "chat.main()"),
    "python -m benchmarks.checkpoint": ("tests/benchmarks/test_capacity.py", "checkpoint.main()"),
    "python -m benchmarks.eviction": ("tests/benchmarks/test_eviction.py", "eviction.main()"),
    "python -m benchmarks.exercises": ("tests/benchmarks/test_exercises.py", "exercises.main()"),
    "python -m benchmarks.quality": ("tests/benchmarks/test_quality.py", "quality.main()"),
    "python -m vllm_fox.cli": ("tests/cli/test_app.py", '"vllm_fox.cli"'),
    "python -m vllm_fox.convert": ("tests/families/evicting/test_convert.py", '"vllm_fox.convert"'),
    "python .ci/vllm_changes.py": ("tests/test_vllm_changes.py", "vllm_changes.py"),
    "python examples/client.py": ("tests/examples/test_offline_and_client.py", "client"),
    "python examples/finetune_dcp.py": ("tests/examples/test_finetune_dcp.py", "finetune_dcp"),
    "python examples/ray_batch.py": ("tests/examples/test_ray.py", "ray_batch"),
    "python examples/retrofit.py": ("tests/examples/test_retrofit.py", "retrofit"),
    "python examples/train_fox.py": ("tests/examples/test_train_fox.py", "train_fox"),
    "sha256sum": ("tests/engine/test_packaging.py", '"sha256sum"'),
    "vllm run-batch": ("tests/external/test_run_batch.py", "run-batch"),
    "vllm serve": ("tests/external/serving.py", '"serve"'),
    "vllm-fox --help": (".ci/check_installed.py", 'run("--help")'),
    "vllm-fox convert": ("tests/cli/test_convert.py", 'run("convert"'),
    "vllm-fox doctor": ("tests/cli/test_doctor.py", '"doctor"'),
    "vllm-fox inspect": ("tests/cli/test_inspect.py", '"inspect"'),
    "vllm-fox map": ("tests/cli/test_map.py", '"map"'),
    "vllm-fox plan": ("tests/cli/test_plan.py", '"plan"'),
    "vllm-fox top": ("tests/cli/test_top.py", '"top"'),
}
"""Programs that the docs run, the file that runs them too, and words of that file."""
NOT_RUN = {
    ".venv-release/bin/twine upload": "an account at the package index",
    "accelerate launch": "two GPUs",
    "apt-get install": "the network, and an administrator",
    "git commit": "a maintainer's key",
    "git push": "a repository to push to",
    "git tag": "a maintainer's key",
    "git verify-tag": "a signed tag",
    "hf download": "the network",
    "make audit": "a database of advisories on the network",
    "make clean": "an environment that is not the one which the tests run in",
    "make demo": "an installation in the checkout, and minutes; tests/examples/test_demo.py tests its parts",
    "make lint": "the time; it belongs to each change instead",
    "make lock": "the network; tests/test_constraints.py runs its script",
    "make release": "the network; tests/engine/test_packaging.py runs its checks",
    "make serve": "an installation in the checkout; what it runs then is examples/serve.sh",
    "pip install": "the network",
    "pipx install": "the network",
    "python -m benchmarks.cluster_sim": "a run of benchmarks.serving that was saved on a GPU",
    "python -m benchmarks.cpu": "minutes",
    "python -m benchmarks.dcp": "the extra bench, and a trained run",
    "python -m benchmarks.dcp_kernels": "a GPU",
    "python -m benchmarks.dcp_serving": "a GPU",
    "python -m benchmarks.eviction_kernels": "a GPU",
    "python -m benchmarks.fuzz": "Schemathesis, and minutes; tests/benchmarks/test_fuzz.py tests its parts",
    "python -m benchmarks.goodput": "a GPU; tests/benchmarks/test_goodput.py tests its parts",
    "python -m benchmarks.kernels": "a GPU",
    "python -m benchmarks.kills": "minutes; tests/benchmarks/test_kills.py tests its parts",
    "python -m benchmarks.kills_ray": "minutes; tests/benchmarks/test_kills_ray.py tests its parts",
    "python -m benchmarks.live_pages": "the extra bench, and a minute",
    "python -m benchmarks.page_size": "minutes",
    "python -m benchmarks.precision": "a GPU",
    "python -m benchmarks.retrofit_speed": "a GPU",
    "python -m benchmarks.scheduler_cost": "a machine that does nothing else",
    "python -m benchmarks.serving": "a GPU",
    "python -m benchmarks.soak": "minutes; tests/benchmarks/test_soak.py tests its parts",
    "python -m benchmarks.speculation": "minutes",
    "python -m benchmarks.training": "a GPU",
    "python -m benchmarks.weights": "a GPU",
    "python examples/ray_serve.py": "Ray Serve on a cluster",
    "ray up": "machines of a cloud",
    "torchrun examples/retrofit.py": "several GPUs",
    "torchrun examples/train_fox.py": "several GPUs",
    "vllm-fox --install-completion": "a user's shell, whose files it changes",
}
"""Programs that the docs run and nothing else does, and what continuous integration lacks for them."""


def test_every_command_is_run_or_needs_what_there_is_not() -> None:
    unknown = [f"{page.name}: {command.text}" for page, command in COMMANDS if command.program not in RUN | NOT_RUN]
    assert not unknown, "add them to RUN or NOT_RUN"
    assert RUN.keys() | NOT_RUN.keys() == {command.program for _, command in COMMANDS}, "left over in a list"
    assert not RUN.keys() & NOT_RUN.keys()


@pytest.mark.parametrize("program", RUN)
def test_what_runs_a_program_names_it(program: str) -> None:
    path, words = RUN[program]
    assert words in (ROOT / path).read_text()


@pytest.mark.parametrize("program", sorted({command.program for _, command in COMMANDS}))
def test_options_and_files_of_commands_exist(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for page, command in COMMANDS:
        if command.program == program:
            problem = wrong(command, monkeypatch)
            assert problem is None, f"{page.name}: {command.text}: {problem}"


def wrong(command: Command, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a command names that there is not, as far as its program's options are known here; None if nothing."""
    kind, *rest = command.program.split()
    words = list(command.arguments)
    if kind == "make":
        makefile = (ROOT / "Makefile").read_text()
        names = [*rest, *(word.partition("=")[0] for word in words)]
        return next((name for name in names if not re.search(rf"^(?:#   )?{name}(?:=|:)", makefile, re.M)), None)
    if kind == "pytest":
        return next((word for word in words if word.startswith("tests/") and not (ROOT / word).exists()), None)
    if command.program == "pip install":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        found = [re.fullmatch(r"(?:\.|vllm-fox)\[(.*)\]", word) for word in words]
        return next((one for match in found if match for one in match[1].split(",") if one not in extras), None)
    if kind == "vllm-fox" and rest[0] not in OPTIONS_OF_ALL:
        if "--" in words:
            end = words.index("--")
            words, others = words[:end], words[end + 1 :]
            if (problem := unknown(others, vllm_options())) is not None:
                return problem
        return unknown(words, vllm_fox_options(rest[0]))
    if command.program == "vllm serve":
        return unknown(words, vllm_options())
    script = next((word for word in (*rest, *words) if word.endswith(".py")), None)
    if script is not None and script.startswith("examples/"):
        after = words[words.index(script) + 1 :] if script in words else words
        return argparse_problem(Path(script).stem, after, monkeypatch)
    if command.program.startswith("python -m benchmarks."):
        return argparse_problem(rest[1], words, monkeypatch)
    if command.program == "python -m vllm_fox.convert":
        return unknown(words, vllm_fox_options("convert"))
    return None


OPTIONS_OF_ALL = ("--help", "--install-completion", "--show-completion", "--version")
"""Options of ``vllm-fox`` that stand before a command."""
NEED_MATPLOTLIB = ("benchmarks.cached_pages", "benchmarks.dcp", "benchmarks.live_pages")


def argparse_problem(module: str, words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """The first option, or value of an option with choices, that a script does not know."""
    if module in NEED_MATPLOTLIB:
        pytest.importorskip("matplotlib")
    parser = parser_of(module, monkeypatch)
    options = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and words:
            if words[0] not in action.choices:
                return words[0]
            options |= action.choices[words[0]]._option_string_actions
    for option, value in zip(words, [*words[1:], ""]):
        choices = options[option].choices if option in options else None
        if choices is not None and value not in map(str, choices):
            return f"{option} {value}"
    return unknown(words, options)


def unknown(words: Sequence[str], options: Sequence[str] | set[str] | dict[str, argparse.Action]) -> str | None:
    """The first word that is an option and not among those that there are."""
    names = (word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word))
    return next((name for name in names if name not in options), None)


def vllm_fox_options(command: str) -> set[str]:
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009 (a group's, not every command's)
    return {"--help"} | {option for one in commands[command].params for option in one.opts + one.secondary_opts}


@cache
def vllm_options() -> set[str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)


def test_serve_sh_gives_vllm_options_that_there_are(tmp_path: Path) -> None:
    """With a ``vllm`` in front of the real one that prints what it is given."""
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    command = ["bash", ROOT / "examples" / "serve.sh", "examples/fox-tiny", "--seed", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True
    )
    first, model, *words = done.stdout.splitlines()
    assert first == "serve" and model == "examples/fox-tiny" and words[-2:] == ["--seed", "1"]
    assert unknown(words, vllm_options()) is None


@pytest.mark.parametrize(
    ("markdown", "programs"),
    [
        ("    $ frobnicate now\n", ["frobnicate"]),
        ("```\nvllm serve M \\\n    --seed 1\n```\n", ["vllm serve"]),
        ("```python\npython = 3\n```\n", []),
        ("    A=1 vllm-fox top URL   # until it's ended\n", ["vllm-fox top"]),
        ("Run `pip install\nx && make\ntest`.", ["pip install", "make test"]),
        ("Every vllm serve in `vllm` counts.", []),
    ],
)
def test_how_commands_are_found(markdown: str, programs: list[str]) -> None:
    assert [command.program for command in commands_in(markdown)] == programs
