"""``vllm-fox doctor``: what is wrong on this machine, and how to mend it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer

from .errors import FINE, WRONG, CommandError
from .options import Json, choice, whole


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder of a checkpoint to look at, or its name in the Hugging Face cache.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="-- ARGUMENTS",
            help="Arguments of `vllm serve` for the engine (not such as --host) to try with MODEL, behind --.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            parser=choice("--device", "auto", "cpu", "gpu"),
            help="What is to serve: cpu, gpu (it is wrong if there is none) or auto.",
            metavar="DEVICE",
        ),
    ] = "auto",
    port: Annotated[
        int | None,
        typer.Option(
            parser=whole("--port", 1, 65535),
            help="On which a server is to listen. Unless given, 8000 is looked at, and may be in use.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Run the leaf functions, for 30 seconds at most.")
    ] = True,
    as_json: Json = False,
) -> int:
    """Look for what keeps models that forget from being served, and say how to mend it.

    Looked at are Python, torch, Triton, vLLM, the plugin, the GPU, environment variables, the checkpoint and all
    that vLLM checks before it loads it, and the port; then the leaf functions are run. The exit code is 1 if
    anything is wrong.
    """
    if model is not None and model.startswith("-"):
        raise CommandError(f"MODEL is {model}: give the folder of a checkpoint before -- and its arguments.")
    # What vLLM says on the way goes to standard error, and only if it is an error.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from .checks import Asked, Status, examine

    findings = []
    asked = Asked(model, tuple(arguments or ()), device, port, self_test)
    for finding in examine(asked):
        findings.append(finding)
        if not as_json:
            _show(finding.check, finding.status.value, finding.found, finding.mend)
    wrong = sum(finding.status is Status.WRONG for finding in findings)
    if as_json:
        print(json.dumps({"fine": not wrong, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print("Nothing is wrong." if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong.")
    return WRONG if wrong else FINE


MARKS = {"ok": "[green]ok[/]", "note": "[cyan]note[/]", "wrong": "[bold red]WRONG[/]", "skipped": "[dim]skipped[/]"}
"""How a status looks."""


def _show(check: str, status: str, found: str, mend: str | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    padding = " " * (8 - len(Text.from_markup(MARKS[status]).plain))
    console.print(f"{MARKS[status]}{padding}{check}: {escape(found)}")
    if mend is not None:
        console.print(f"        {escape(mend)}")
