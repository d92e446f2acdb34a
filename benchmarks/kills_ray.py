"""Kill processes of Ray Serve's replicas under load: who hears of it, and when does a replacement answer?

    python -m benchmarks.kills_ray examples/fox-tiny --replicas 1

It starts examples/ray_serve.py. For each kind of process that serves, it lets clients stream answers, kills
(SIGKILL) the oldest process of the kind, and waits until a replica has been started in its place, Ray Serve counts
as many running ones as before, and a new request has been answered. From the kill on it sends short requests as
well, one after the other. With one replica these show when its replacement answers. With two, each kill leaves the
replacement of an earlier one to serve alone. The exit code is 1 if a client waits without an answer, if there is no
replacement within --limit seconds, or if processes or shared memory are left over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.kill_clients import Client, Newcomers
from benchmarks.kills import CLIENTS, command_of, conclude, end_when_told, lives, processes_of, shared_by, until
from benchmarks.options import Parser, positive_float, positive_int
from benchmarks.record import prepare

if TYPE_CHECKING:
    from local_server import Checkpoint, Server

REPLICA = "ray::ServeReplica"
VICTIMS = {
    "replica": ":LLMServer:",
    "engine core": "VLLM::EngineCore",
    "worker": "VLLM::Worker",
    "web front": ":OpenAiIngress",
}
"""Words of the command line of each kind of process that serves; all are replicas of Ray's, or belong to one."""
START_S = 600.0


def of_kind(server: Server, words: str) -> set[psutil.Process]:
    """The processes whose command line has these words."""
    return {one for one in processes_of(server) if words in command_of(one)}


def oldest(server: Server, words: str) -> psutil.Process:
    """The oldest process of a kind."""
    found = of_kind(server, words)
    if not found:
        raise SystemExit(f"kills_ray: there is no process with {words} in its command line.")
    return min(found, key=lambda one: one.create_time())


def replica_of(process: psutil.Process) -> list[psutil.Process]:
    """All processes of the replica that a process belongs to, the replica itself first."""
    (first,) = (one for one in (process, *process.parents()) if REPLICA in command_of(one))
    return [first, *first.children(recursive=True)]


def end(server: Server, patience: float = 20.0) -> list[str]:
    """Tell a server to stop; kill what is left of it so many seconds after its end, and return the names."""
    server.process.terminate()
    until(lambda: server.process.poll() is not None, 60)
    until(lambda: not processes_of(server), patience)
    left = processes_of(server)
    names = [command_of(process)[:60] for process in left]
    for process in left:  # Ray's have process groups of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.process.wait()
    until(lambda: not any(map(lives, left)), 20)
    return names


@contextlib.contextmanager
def running_replicas(model: Checkpoint, count: int, folder: Path, log: Path) -> Iterator[Server]:
    """examples/ray_serve.py with so many replicas, and Ray's files in ``folder``; it ends with the block."""
    import local_server

    port = local_server.free_port()
    engine = {
        "enforce_eager": True,
        "max_model_len": model.context,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": model.kv_bytes,
    }
    script = Path(local_server.__file__).with_name("ray_serve.py")
    command = [sys.executable, str(script), "--model", str(model.folder), "--name", local_server.MODEL_NAME]
    command += ["--port", str(port), "--engine-args", json.dumps(engine), "--verbose"]
    command += ["--min-replicas", str(count), "--max-replicas", str(count)]
    # Of this cluster alone, so that this program may ask it for its state.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = local_server.server_environment() | {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    server = local_server.Server(process, f"http://127.0.0.1:{port}", log)
    try:
        yield server
    finally:
        end(server)


def wait_until_serving(server: Server) -> None:
    """Wait until all replicas are there, which the server says with its address."""
    until(lambda: server.process.poll() is not None or server.url in server.log.read_text(), START_S)
    server.check()


def connect(server: Server) -> None:
    """Let this program ask the server's cluster for its state."""
    import ray

    words = oldest(server, "raylet/raylet").cmdline()
    (address,) = (word.partition("=")[2] for word in words if word.startswith("--gcs-address="))
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="serve")


def running() -> int:
    """How many replicas run, the web front's included, as Ray Serve counts them."""
    from ray import serve

    deployments = [one for app in serve.status().applications.values() for one in app.deployments.values()]
    return sum(n for one in deployments for state, n in one.replica_states.items() if state == "RUNNING")


def one(server: Server, victim: str, tokens: int, limit: float) -> dict[str, Any]:
    """Kill ``victim`` under load, and see what becomes of clients and replicas."""
    import local_server

    clients = [Client(server.url, local_server.MODEL_NAME, tokens, limit) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    if not all(client.answering.wait(120) for client in clients):
        raise SystemExit("kills_ray: the server does not answer.")
    process, before = oldest(server, VICTIMS[victim]), running()
    doomed = replica_of(process)
    kind = command_of(doomed[0])
    known = of_kind(server, kind)
    shared = shared_by(doomed)
    newcomers = Newcomers(server.url, local_server.MODEL_NAME, limit)
    begin = time.monotonic()
    process.kill()
    newcomers.start()
    gone = until(lambda: not any(map(lives, doomed)), limit)
    # Ray Serve counts a dead replica as running until it has noticed, and only then starts another.
    started = until(lambda: of_kind(server, kind) - known, limit)
    replaced = started and until(lambda: running() == before and newcomers.served, limit)
    for client in clients:
        client.stop()
    row = {
        "replica_gone_s": gone,
        "replaced_s": None if gone is None or replaced is None else time.monotonic() - begin,
        "newcomers": newcomers.stop(),
        "clients_ended_s": [client.ended_at and client.ended_at - begin for client in clients],
        "clients_wait": sum(client.waits for client in clients),
        "client_errors": dict(Counter(client.error for client in clients)),
        "left": [command_of(one)[:60] for one in doomed if lives(one)],
        "shared_memory": sorted(path.name for path in shared - shared_by(processes_of(server)) if path.exists()),
    }
    for client in clients:
        client.join(limit)
    return row


def failures(victim: str, row: dict[str, Any]) -> list[str]:
    """What is wrong, a sentence each, in what a kill left."""
    found = []
    if row["clients_wait"]:
        found.append("a client still waits for an answer")
    if row["replaced_s"] is None:
        found.append("there is no replacement that serves")
    if row["left"]:
        found.append(f"processes are left: {row['left']}")
    if row["shared_memory"]:
        found.append(f"shared memory is left: {row['shared_memory']}")
    return [f"{victim} was killed: {what}." for what in found]


def main() -> None:
    import local_server

    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--replicas", type=positive_int, default=1)
    parser.add_argument("--limit", type=positive_float, default=240.0, help="seconds in which all must be replaced")
    parser.add_argument("--json", type=Path, default=Path("results/kills_ray.json"))
    args = parser.parse_args()
    end_when_told()
    prepare("--json", args.json)
    folder = args.model.resolve()
    rows, wrong = dict[str, dict[str, Any]](), list[str]()
    log = Path(tempfile.mkdtemp(prefix="vllm-fox-kills-logs-")) / "server.log"
    try:
        model = local_server.Checkpoint.of(folder, local_server.read_config(folder))
        with (
            tempfile.TemporaryDirectory(prefix="vllm-fox-kills-", ignore_cleanup_errors=True) as scratch,
            running_replicas(model, args.replicas, Path(scratch), log) as server,
        ):
            wait_until_serving(server)
            connect(server)
            for victim in VICTIMS:
                rows[victim] = row = one(server, victim, model.context - 64, args.limit)
                wrong += failures(victim, row)
                print(f"{victim}: {row}", flush=True)
            if left := end(server):
                wrong.append(f"The end of the server left processes: {left}.")
    except (local_server.ServerError, OSError) as error:
        raise SystemExit(f"kills_ray: {error}") from None
    conclude(args, rows, wrong, "every client heard of it, a replacement answered, and nothing was left.")


if __name__ == "__main__":
    main()
