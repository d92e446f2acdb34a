"""What counts as wrong after a kill of a replica, and which processes belong to one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from local_server import Server

from benchmarks.kills import lives, until
from benchmarks.kills_ray import VICTIMS, end, failures, of_kind, oldest, replica_of
from tests.support import patience

GOOD: dict[str, Any] = {"clients_wait": 0, "replaced_s": 30.0, "left": [], "shared_memory": []}
BAD: dict[str, dict[str, Any]] = {
    "a client still waits for an answer": {"clients_wait": 1},
    "there is no replacement that serves": {"replaced_s": None},
    "processes are left: ['Worker']": {"left": ["Worker"]},
    "shared memory is left: ['one']": {"shared_memory": ["one"]},
}
TREE = """
import subprocess, sys
name = sys.argv[1]
if name == "cluster":
    children = ["ray::ServeReplica:a:LLMServer:a", "ray::ServeReplica:a:LLMServer:a"]
else:
    children = ["VLLM::EngineCore"] if name.startswith("ray") else []
for child in children:
    subprocess.Popen([sys.executable, sys.argv[0], child])
input()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Processes with the names of two replicas and of the engine of each."""
    script = tmp_path / "tree.py"
    script.write_text(TREE)
    command = [sys.executable, str(script), "cluster"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    server = Server(process, "", Path())
    # By their names, since a process that has just begun still has that of its parent.
    engines = VICTIMS["engine core"]
    assert until(lambda: len(of_kind(server, engines)) == 2, patience(20)) is not None
    yield server
    end(server, patience=0)


def test_nothing_is_wrong_if_a_replacement_serves() -> None:
    assert failures("worker", GOOD) == []


@pytest.mark.parametrize("sentence", BAD)
def test_each_is_wrong(sentence: str) -> None:
    assert failures("worker", GOOD | BAD[sentence]) == [f"worker was killed: {sentence}."]


def test_a_replica_is_found_by_any_of_its_processes(server: Server) -> None:
    replica, engine = (oldest(server, VICTIMS[kind]) for kind in ("replica", "engine core"))
    assert replica_of(engine) == [engine.parent(), engine]
    assert replica_of(replica) == [replica, *replica.children()]
    with pytest.raises(SystemExit, match="no process with VLLM::Worker"):
        oldest(server, VICTIMS["worker"])
    replica.kill()
    assert until(lambda: not lives(replica), patience(20)) is not None
    assert oldest(server, VICTIMS["replica"]) != replica


def test_the_end_names_what_was_left_and_leaves_nothing(server: Server) -> None:
    processes = psutil.Process(server.process.pid).children(recursive=True)
    left = end(server, patience=0)
    assert len(left) == 4
    assert not any(map(lives, processes))
