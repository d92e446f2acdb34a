"""The program ``vllm-fox``: its commands, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from vllm_fox import __version__

from .convert import convert
from .doctor import doctor
from .errors import FINE, USAGE, WRONG, CommandError
from .inspect import inspect
from .map import map
from .plan import plan
from .top import top

HELP = """Look at models that forget, at this machine, and at servers that serve such models.

Exit codes: 0 if all is well, 1 if something is wrong or a command could not do its work, 2 if the command line is
wrong."""

app = typer.Typer(name="vllm-fox", help=HELP, pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(inspect)
app.command()(map)
app.command()(plan)
app.command()(doctor)
app.command()(convert)
app.command()(top)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vllm-fox {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """The options that stand before a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: the command line behind the program's name; that of the process unless given.

    Returns:
        The exit code (see :mod:`.errors`). What is wrong has been printed to standard error in one sentence.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code = app(spread(spread(given, "--tokens"), "--tp"), prog_name="vllm-fox", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else FINE
    except CommandError as error:
        return _fail(str(error), error.code)
    except typer.TyperException as error:
        message = " ".join(error.format_message().split())
        command = " ".join(["vllm-fox", *given[:1]]) if given and given[0] in COMMANDS else "vllm-fox"
        return _fail(f"{message.rstrip('.?')}; `{command} --help` says what is allowed.", USAGE)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("Interrupted.", WRONG)
    except BrokenPipeError:
        # What reads the output has ended, as `head` does. Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return WRONG


COMMANDS = ("inspect", "map", "plan", "doctor", "convert", "top")
"""Names of the commands."""


def spread(arguments: Sequence[str], option: str) -> list[str]:
    """Let an option take several numbers: ``--tokens 1 2`` becomes ``--tokens 1 --tokens 2``."""
    done: list[str] = []
    taking = False
    for argument in arguments:
        if argument == "--":
            return [*done, *arguments[arguments.index("--") :]]
        if taking and argument.isdecimal() and done[-1] != option:
            done.append(option)
        elif done[-1:] != [option]:
            taking = argument == option
        done.append(argument)
    return done


def _fail(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code
