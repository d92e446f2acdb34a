"""What counts as wrong after a kill, and how processes and their shared memory are found."""

from __future__ import annotations

import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo import Server

from benchmarks.kills import failures, processes_of, shared_by, until

GOOD: dict[str, Any] = {
    "server_ended_s": 2.0,
    "left": [],
    "clients_ended_s": [0.1, 0.2],
    "shared_memory": ["one"],
    "files": ["a", "b"],
    "checkpoint_changed": False,
}
BAD: dict[str, dict[str, Any]] = {
    "the server has not ended": {"server_ended_s": None},
    "processes are left: ['Worker']": {"left": ["Worker"]},
    "a client still waits for an answer": {"clients_ended_s": [0.1, None]},
    "shared memory is left besides: ['one', 'two']": {"shared_memory": ["one", "two"]},
    "files are left besides: ['a', 'b', 'c']": {"files": ["a", "b", "c"]},
    "a file of the checkpoint has changed": {"checkpoint_changed": True},
}


def test_nothing_is_wrong_if_no_more_is_left_than_usual() -> None:
    assert failures("Worker", GOOD, GOOD) == []


@pytest.mark.parametrize("sentence", BAD)
def test_each_is_wrong(sentence: str) -> None:
    assert failures("Worker", GOOD | BAD[sentence], GOOD) == [f"Worker was killed: {sentence}."]


def test_processes_are_found_by_their_session_after_their_parent_has_gone() -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '60']); print(flush=True); input()"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True)
    server = Server(process, "", Path())
    assert process.stdout is not None
    process.stdout.readline()
    names = {one.name() for one in processes_of(server)}
    assert "sleep" in names and len(names) == 2
    process.kill()
    process.wait()
    (left,) = processes_of(server)
    assert left.name() == "sleep"
    left.kill()
    assert until(lambda: not processes_of(server), 10) is not None


def test_shared_memory_is_found_while_it_is_there() -> None:
    memory = SharedMemory(create=True, size=4096)
    me = psutil.Process()
    assert Path("/dev/shm", memory.name) in shared_by([me])
    memory.close()
    memory.unlink()
    assert Path("/dev/shm", memory.name) not in shared_by([me])
