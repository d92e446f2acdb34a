"""Running the training scripts of examples/ as their users do."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT, patience

LIMIT_S = 120


class Done(NamedTuple):
    """How a process ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """Processes with their imports behind them, one after the other (:mod:`tests.support.forked_scripts`)."""

    def __init__(self, *modules: str) -> None:
        command = [sys.executable, str(ROOT / "tests" / "support" / "forked_scripts.py"), str(ROOT / "examples")]
        self._server = subprocess.Popen(
            [*command, *modules], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._folder = tempfile.TemporaryDirectory()
        atexit.register(self.close)

    def close(self) -> None:
        """End the server, which has no more requests once its standard input is closed."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(patience(LIMIT_S))

    def _answer(self, limit: float) -> int:
        assert self._server.stdout is not None
        assert select.select([self._server.stdout], [], [], limit)[0], f"nothing within {limit:.0f} s"
        return int(self._server.stdout.readline())

    def run(self, *argv: str, **environment: str) -> Done:
        """Run a script, or a program after ``-c``, to its end."""
        assert self._server.stdin is not None
        files = {name: str(Path(self._folder.name, name)) for name in ("output", "errors")}
        request = json.dumps({"argv": argv, "environment": environment, **files})
        self._server.stdin.write(f"{request}\n".encode())
        limit = patience(LIMIT_S)
        pid = self._answer(limit)
        try:
            code = self._answer(limit)
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
            self._answer(limit)
            raise
        return Done(code, *(Path(file).read_text() for file in files.values()))


@cache
def forks() -> Forks:
    """Those of this process: the scripts import the same."""
    return Forks("train_fox", "finetune_dcp", "retrofit")


@dataclass(frozen=True)
class Script:
    """One of examples/, the options that a test gives it, and what it is given before the folder of texts."""

    name: str
    options: tuple[str, ...]
    first: tuple[str, ...] = ()

    def arguments(self, text: Path, output: Path, *more: str) -> list[str]:
        return [*self.first, str(text), "--output", str(output), *self.options, *more]

    def command(self, text: Path, output: Path, *more: str) -> list[str]:
        return [str(ROOT / "examples" / self.name), *self.arguments(text, output, *more)]

    def run_alone(self, text: Path, output: Path) -> str:
        """To its end, in a Python that nobody has prepared; returns what it printed."""
        command = [sys.executable, *self.command(text, output)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def run(self, text: Path, output: Path, *more: str) -> str:
        """To its end; returns what it printed."""
        done = forks().run(*self.command(text, output, *more))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def stopped_at(self, text: Path, output: Path, step: int, number: signal.Signals, *more: str) -> int:
        """Run until a step is logged, when the process sends itself a signal; the exit code.

        A signal from outside could arrive any number of steps later.
        """
        module = self.name.removesuffix(".py")
        program = f"""if 1:
            import signal, sys, training_run, {module}
            write = training_run.Log.write
            def write_and_stop(log, **values):
                write(log, **values)
                if values["step"] == {step} and str(log.file.name).endswith("/log.jsonl"):
                    signal.raise_signal({number.value})
            training_run.Log.write = write_and_stop
            {module}.main(sys.argv[1:])
        """
        return forks().run("-c", program, *self.arguments(text, output, *more)).returncode

    def errors(self, runs: list[list[str]]) -> list[str]:
        """What each run, given as arguments, ends with. All are in one process."""
        module = self.name.removesuffix(".py")
        program = f"import sys, json, {module}\n" + (
            "for args in json.loads(sys.argv[1]):\n"
            f"    try: {module}.main(args)\n"
            "    except SystemExit as error: print('ERROR', error)\n"
        )
        done = forks().run("-c", program, json.dumps(runs), CUDA_VISIBLE_DEVICES="")
        found = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        assert len(found) == len(runs), done.stdout + done.stderr[-3000:]
        return found


def log(output: Path, name: str = "log.jsonl") -> list[dict]:
    """Lines of a run's log."""
    path = output / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
