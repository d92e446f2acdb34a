"""Runs scripts one after the other, each in a process of its own that has its imports behind it.

    python tests/support/forked_scripts.py FOLDER MODULE...

Importing torch, transformers and accelerate takes longer than a run of a training script that is as short as in the
tests, of which there are dozens. This program imports MODULEs, with FOLDER in front of the path, and then forks for
each line on standard input: the JSON object of a :class:`Request`. The fork runs what is asked for as a fresh
Python would, from signals to the exit code. Lines on standard output are its process id, and once it has ended, the
exit code as :mod:`subprocess` gives it.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from typing import TypedDict


class Request(TypedDict):
    """A command to run.

    Attributes:
        argv: a script and its arguments, or ``-c``, a program and its arguments.
        environment: variables that are other than this program's.
        output, errors: files for what it prints.
    """

    argv: list[str]
    environment: dict[str, str]
    output: str
    errors: str


def next_script() -> Request | None:
    """In a fork, what it is to run; None in this process, once no more requests come."""
    for line in sys.stdin:
        request: Request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    return None


def run(request: Request) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    files = [os.open(os.devnull, os.O_RDONLY), *(os.open(request[name], flags) for name in ("output", "errors"))]
    for standard, file in enumerate(files):
        os.dup2(file, standard)
        os.close(file)
    os.environ |= request["environment"]
    first, *rest = request["argv"]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = request["argv"]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = sys.argv[1]
    for module in sys.argv[2:]:
        importlib.import_module(module)
    if (mine := next_script()) is not None:
        run(mine)
