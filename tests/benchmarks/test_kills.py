"""What counts as wrong after a kill, and how processes and their shared memory are found."""

from __future__ import annotations

import signal
import subprocess
import sys
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil
import pytest
from local_server import Server

from benchmarks.kills import failures, processes_of, shared_by, until
from tests.support import ROOT, patience

GOOD: dict[str, Any] = {
    "server_ended_s": 2.0,
    "serves": False,
    "left": [],
    "clients_wait": 0,
    "shared_memory": ["one"],
    "files": ["a", "b"],
    "checkpoint_changed": False,
}
BAD: dict[str, dict[str, Any]] = {
    "the server has neither ended nor does it serve": {"server_ended_s": None},
    "processes are left: ['Worker']": {"left": ["Worker"]},
    "a client still waits for an answer": {"clients_wait": 1},
    "shared memory is left besides: ['one', 'two']": {"shared_memory": ["one", "two"]},
    "files are left besides: ['a', 'b', 'c']": {"files": ["a", "b", "c"]},
    "a file of the checkpoint has changed": {"checkpoint_changed": True},
}


def test_nothing_is_wrong_if_no_more_is_left_than_usual() -> None:
    assert failures("Worker", GOOD, GOOD) == []


@pytest.mark.parametrize("sentence", BAD)
def test_each_is_wrong(sentence: str) -> None:
    assert failures("Worker", GOOD | BAD[sentence], GOOD) == [f"Worker was killed: {sentence}."]


def test_a_server_that_serves_on_has_its_processes_and_memory() -> None:
    serving = {"server_ended_s": None, "serves": True, "left": ["Worker"], "shared_memory": ["one", "two"]}
    assert failures("Worker", GOOD | serving, GOOD) == []
    assert failures("Worker", GOOD | serving | {"clients_wait": 1}, GOOD) != []


def test_processes_are_found_by_their_session_after_their_parent_has_gone() -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '600']); print(flush=True); input()"
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
    assert until(lambda: not processes_of(server), patience(10)) is not None


def test_shared_memory_is_found_while_it_is_there() -> None:
    memory = SharedMemory(create=True, size=4096)
    me = psutil.Process()
    assert Path("/dev/shm", memory.name) in shared_by([me])
    memory.close()
    memory.unlink()
    assert Path("/dev/shm", memory.name) not in shared_by([me])


def test_a_run_that_is_told_to_end_leaves_its_blocks() -> None:
    code = (
        "import time; from benchmarks.kills import end_when_told\n"
        "end_when_told()\n"
        "try:\n    print(flush=True); time.sleep(600)\n"
        "finally:\n    print('left')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.communicate(timeout=patience(30))[0] == "left\n"
    assert process.returncode == 128 + signal.SIGTERM
