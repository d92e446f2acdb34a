"""Kill each process of a server under load: does the server end, do its clients hear of it, is anything left?

    python -m benchmarks.kills examples/fox-tiny --tensor 2
    python -m benchmarks.kills examples/fox-tiny --data 2

It starts `vllm serve MODEL` once for every kind of process that the server has, sends it requests that stream,
kills (SIGKILL) one process of the kind, and waits. From the kill on it sends short requests as well, one after the
other, to see whether what is left of the server serves. Every next start also proves that a start works after a
kill. The exit code is 1 if a client waits without an answer or a process lives on for longer than --limit seconds
though the server does not serve, or if shared memory or files are left over that an ordinary end does not leave.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.kill_clients import Client, Newcomers
from benchmarks.options import Parser, positive_float, positive_int
from benchmarks.record import prepare, save

if TYPE_CHECKING:
    from local_server import Checkpoint, Server

CLIENTS = 4
SHARED_MEMORY = "/dev/shm/"
ORDINARY = "nobody"
"""In place of a victim: the server is told to stop when it is idle, as is usual."""


def command_of(process: psutil.Process) -> str:
    """A process's command line, which is empty when it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked about yet does not."""
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def processes_of(server: Server) -> list[psutil.Process]:
    """The processes of a server's session, whoever their parents are by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) == server.process.pid and lives(process):
                found.append(process)
    return found


def kinds(server: Server) -> dict[str, psutil.Process]:
    """A process of each kind: by its name, and the server itself by ``vllm``."""
    found = {"vllm": psutil.Process(server.process.pid)}
    for process in processes_of(server):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = command_of(process)
            # API servers of several differ in nothing but their numbers.
            own = re.sub(r"(?<=^APIServer)_\d+$", "", words.partition("::")[2].strip()) or process.name()
            # Python's own helper of multiprocessing, which cleans up after the others.
            name = "resource_tracker" if "resource_tracker" in words else own
            if process.pid != server.process.pid:
                found.setdefault(name, process)
    return found


def until(holds: Any, limit: float) -> float | None:
    """Seconds until something holds; None if it does not within ``limit``."""
    begin = time.monotonic()
    while not holds():
        if time.monotonic() - begin > limit:
            return None
        time.sleep(0.05)
    return time.monotonic() - begin


def shared_by(processes: Iterable[psutil.Process]) -> set[Path]:
    """The files of shared memory that processes have mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found |= {Path(one.path) for one in process.memory_maps() if one.path.startswith(SHARED_MEMORY)}
    return {path for path in found if path.exists()}


def one(model: Checkpoint, options: list[str], victim: str, limit: float, log: Path) -> dict[str, Any]:
    """Start a server, kill ``victim`` under load, and see what becomes of the rest."""
    import local_server

    weights = {path: path.stat().st_mtime_ns for path in model.folder.iterdir()}
    with tempfile.TemporaryDirectory(prefix="vllm-fox-kills-") as scratch:
        os.environ["TMPDIR"] = scratch
        with local_server.running_server(model, log, *options) as server:
            local_server.wait_until_healthy(server, timeout=600)
            there = kinds(server)
            if victim not in there and victim != ORDINARY:
                raise SystemExit(f"kills: there is no process {victim}, only {', '.join(there)}.")
            clients = [
                Client(server.url, local_server.MODEL_NAME, model.context - 64, limit)
                for _ in range(CLIENTS if victim != ORDINARY else 0)
            ]
            for client in clients:
                client.start()
            if not all(client.answering.wait(120) for client in clients):
                raise SystemExit("kills: the server does not answer.")
            shared = shared_by(processes_of(server))
            newcomers = Newcomers(server.url, local_server.MODEL_NAME, limit)
            begin = time.monotonic()
            if victim == ORDINARY:
                server.process.terminate()
            else:
                there[victim].kill()
                newcomers.start()
            ended = until(lambda: server.process.poll() is not None, limit)
            serves = newcomers.served and ended is None
            gone = until(lambda: not processes_of(server), 0 if serves else limit)
            for client in clients:
                client.join(0 if serves else max(0.0, limit - (time.monotonic() - begin)))
            # Python's helper unlinks shared memory when all who use it are gone.
            until(lambda: serves or not any(path.exists() for path in shared), limit)
            row = {
                "kinds": sorted(there),
                "server_ended_s": ended,
                "exit_status": server.process.poll(),
                "serves": serves,
                "all_gone_s": None if ended is None or gone is None else ended + gone,
                "left": [command_of(process)[:60] for process in processes_of(server)],
                "clients_ended_s": [client.ended_at and client.ended_at - begin for client in clients],
                "clients_wait": sum(client.waits for client in clients),
                "client_errors": dict(Counter(client.error for client in clients)),
                "shared_memory": sorted(path.name for path in shared if path.exists()),
                "files": sorted(path.name for path in Path(scratch).iterdir()),
                "checkpoint_changed": weights != {path: path.stat().st_mtime_ns for path in model.folder.iterdir()},
                "said": said(log),
            }
            for process in processes_of(server):  # so that the next start has the machine for itself
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            if victim != ORDINARY:
                row["newcomers"] = newcomers.stop()
    return row


def said(log: Path) -> str:
    """The first line of a log that speaks of a process that has died; empty if there is none."""
    lines = log.read_text(errors="replace").splitlines()
    words = ("died", "EngineDeadError", "Parent process exited")
    return next((line for line in lines if any(word in line for word in words)), "")[-160:]


def failures(victim: str, row: dict[str, Any], usual: dict[str, Any]) -> list[str]:
    """What is wrong, a sentence each, in what a kill left; ``usual`` is what an ordinary end leaves."""
    found = []
    if row["clients_wait"]:
        found.append("a client still waits for an answer")
    if not row["serves"]:
        if row["server_ended_s"] is None:
            found.append("the server has neither ended nor does it serve")
        if row["left"]:
            found.append(f"processes are left: {row['left']}")
        for what, name in (("shared memory is", "shared_memory"), ("files are", "files")):
            if len(row[name]) > len(usual[name]):
                found.append(f"{what} left besides: {row[name]}")
    if row["checkpoint_changed"]:
        found.append("a file of the checkpoint has changed")
    return [f"{victim} was killed: {what}." for what in found]


def end_when_told() -> None:
    """Let SIGTERM and SIGHUP end this program as an error does, so that it ends what it has started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))


def conclude(args: argparse.Namespace, rows: dict[str, dict[str, Any]], wrong: list[str], well: str) -> None:
    """Save what was found, and say that all is well, or end the program with what is wrong."""
    save(args.json, {"options": {key: str(value) for key, value in vars(args).items()}, "rows": rows})
    if wrong:
        print("\n".join(wrong))
        raise SystemExit(1)
    print(f"Whoever was killed: {well}")


def main() -> None:
    import local_server

    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--tensor", type=positive_int, default=1, help="tensor-parallel ranks")
    parser.add_argument("--data", type=positive_int, default=1, help="data-parallel engines")
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds of processes to kill (default: all)")
    parser.add_argument("--limit", type=positive_float, default=60.0, help="seconds in which all must be over")
    parser.add_argument("--json", type=Path, default=Path("results/kills.json"))
    args = parser.parse_args()
    end_when_told()
    prepare("--json", args.json)
    folder = args.model.resolve()
    rows, wrong = dict[str, dict[str, Any]](), list[str]()
    options = ["--tensor-parallel-size", str(args.tensor), "--data-parallel-size", str(args.data)]
    logs = Path(tempfile.mkdtemp(prefix="vllm-fox-kills-logs-"))
    try:
        model = local_server.Checkpoint.of(folder, local_server.read_config(folder))
        waiting = [ORDINARY]
        while waiting:
            victim = waiting.pop(0)
            rows[victim] = row = one(model, options, victim, args.limit, logs / f"{victim}.log")
            if victim == ORDINARY:
                waiting = args.only or row["kinds"]
            wrong += failures(victim, row, rows[ORDINARY])
            print(f"{victim}: {row}", flush=True)
    except (local_server.ServerError, OSError) as error:
        raise SystemExit(f"kills: {error}") from None
    conclude(args, rows, wrong, "the server ended or served on, every client heard of it, and nothing was left.")


if __name__ == "__main__":
    main()
