"""Running the training scripts of examples/ as their users do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT, patience


@dataclass(frozen=True)
class Script:
    """One of examples/, and the options that a test gives it."""

    name: str
    options: tuple[str, ...]

    def command(self, text: Path, output: Path, *more: str) -> list[str]:
        script = str(ROOT / "examples" / self.name)
        return [sys.executable, script, str(text), "--output", str(output), *self.options, *more]

    def run(self, text: Path, output: Path, *more: str) -> str:
        """To its end; returns what it printed."""
        done = subprocess.run(self.command(text, output, *more), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    def stopped_at(self, text: Path, output: Path, step: int, number: signal.Signals) -> int:
        """Start a run, send a signal once a step is logged; the exit code."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(self.command(text, output), **quiet) as process:  # type: ignore[call-overload]
            deadline = time.monotonic() + 120
            while len(log(output)) < step and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(number)
            code: int = process.wait(timeout=patience(60))
            return code

    def errors(self, runs: list[list[str]]) -> list[str]:
        """What each run, given as arguments, ends with. In one process: each start would take seconds."""
        module = self.name.removesuffix(".py")
        program = f"import sys; sys.path.insert(0, 'examples'); import json, {module}\n" + (
            "for args in json.loads(sys.argv[1]):\n"
            f"    try: {module}.main(args)\n"
            "    except SystemExit as error: print('ERROR', error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(runs)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        found = [line for line in done.stdout.splitlines() if line.startswith("ERROR")]
        assert len(found) == len(runs), done.stdout + done.stderr[-3000:]
        return found


def log(output: Path, name: str = "log.jsonl") -> list[dict]:
    """Lines of a run's log."""
    path = output / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
