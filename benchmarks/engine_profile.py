"""Where the processes of a running engine spend their time, sampled from outside by py-spy.

``python -m benchmarks.serving run --profile FILE`` uses it; FILE holds py-spy's folded stacks, which flame-graph
viewers read too.

    python -m benchmarks.engine_profile FILE...     # where their busiest main threads are, side by side
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.options import lines_of, pass_over, read_text

RATE = 200  # samples a second
PAGES = "vllm_fox/pages/"
# What of it runs on a worker; all else is the scheduler's side.
WORKER_FUNCTIONS = ("bind_connector_metadata", "build_connector_worker_meta", "__getstate__")


def check_py_spy() -> str:
    """py-spy's path; exits with a sentence if it is not installed."""
    found = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("--profile needs py-spy, which is not installed: pip install py-spy")
    return found


@contextmanager
def sampled(path: str) -> Iterator[None]:
    """Sample this process and all that it started, waiting threads included, for as long as the block runs."""
    options = ["--subprocesses", "--threads", "--idle", "--nonblocking", "--format", "raw", "--rate", str(RATE)]
    command = [check_py_spy(), "record", *options, "--output", path, "--pid", str(os.getpid())]
    spy = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        spy.send_signal(2)  # as Ctrl-C does: it writes its file and ends
        spy.wait(timeout=60)


def plugin_shares(path: str) -> dict[str, dict[str, float]]:
    """By process, share of its main thread's time in each entry point of the plugin's page keeping.

    The main threads of the engine core and of the workers are those that run the scheduler and the model.
    """
    samples: Counter[str] = Counter()
    inside: dict[str, Counter[str]] = {}
    for process, frames, count in _main_threads(path):
        samples[process] += count
        entry = next((frame for frame in frames if PAGES in frame), None)
        if entry is not None:
            inside.setdefault(process, Counter())[entry.split(" ")[0].split(".")[-1]] += count
    return {
        process: {name: count / samples[process] for name, count in entries.most_common()}
        for process, entries in inside.items()
    }


def summary(path: str) -> dict[str, float]:
    """Shares of the engine's time: the scheduler's side of the plugin, and the most that a worker spends."""
    shares = plugin_shares(path)
    scheduler = [sum(v for k, v in one.items() if k not in WORKER_FUNCTIONS) for one in shares.values()]
    worker = [sum(v for k, v in one.items() if k in WORKER_FUNCTIONS) for one in shares.values()]
    return {"scheduler": max(scheduler, default=0.0), "worker": max(worker, default=0.0)}


def functions(path: str) -> Counter[str]:
    """Of the main thread of the engine core, or of its worker where it has one, the share of samples that each
    function is on the stack in."""
    found: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    for process, frames, count in _main_threads(path):
        if any("_process_engine_step" in frame or "worker_busy_loop" in frame for frame in frames):
            total[process] += count
            names = {frame.rpartition(":")[0] + ")" for frame in frames if ".py:" in frame}
            found.setdefault(process, Counter()).update(dict.fromkeys(names, count))
    if not total:
        return Counter()
    process, samples = total.most_common(1)[0]
    return Counter({name: count / samples for name, count in found[process].items()})


def _main_threads(path: str) -> Iterator[tuple[str, list[str], int]]:
    """Process, stack from the outermost frame, and samples of it."""
    for number, line in enumerate(lines_of(read_text(Path(path))), 1):
        stack, _, count = line.rpartition(" ")
        if not count.isdigit():
            if line:
                pass_over(f"{path}, line {number}", "it is torn")
            continue
        frames = stack.split(";")
        if any("MainThread" in frame for frame in frames):
            yield next((f for f in reversed(frames) if f.startswith("process ")), "process"), frames, int(count)


def main() -> None:
    files = sys.argv[1:]
    if not files:
        raise SystemExit("Name files that benchmarks.serving or benchmarks.dcp_serving have saved by --profile(s).")
    shares = [functions(file) for file in files]
    names = sorted(set().union(*shares), key=lambda name: -max(share[name] for share in shares))
    for file in files:
        print(file)
    for name in names[:60]:
        print("".join(f"{share[name]:>8.1%}" for share in shares), name)


if __name__ == "__main__":
    main()
