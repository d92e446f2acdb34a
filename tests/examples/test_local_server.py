"""How examples/local_server.py reports a server that ends, and stops one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from local_server import Server, ServerError, stop

from tests.support import patience


def test_a_server_that_ends_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    noise = "INFO see FileNotFoundError: it is harmless\n" * 50
    log.write_text(f"{noise}ERROR core.py] ValueError: the reason\n{noise}DeadError: a consequence\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    with pytest.raises(ServerError, match="exit status 3.*\n.*the reason\n(.|\n)*a consequence") as error:
        Server(process, "http://127.0.0.1:9", log).check()
    assert len(str(error.value).splitlines()) < 30


def test_stopping_ends_the_whole_group_even_if_it_ignores_a_polite_request() -> None:
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout
    child = max(int(process.stdout.readline()) for _ in range(2))
    stop(process, patience(10))
    assert process.returncode == 0
    deadline = time.monotonic() + patience(10)
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting for its parent to notice that it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before the file is opened, or after
        return False


class Broken(BaseHTTPRequestHandler):
    """Ends in the middle of its answers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "9")
        self.end_headers()
        self.wfile.write(b"half")

    def log_message(self, *_: object) -> None:
        """Nothing: standard error is the test's."""


def test_half_an_answer_is_none() -> None:
    with HTTPServer(("127.0.0.1", 0), Broken) as there, subprocess.Popen([sys.executable, "-c", ""]) as process:
        threading.Thread(target=there.handle_request, daemon=True).start()
        with pytest.raises(ConnectionError, match="/metrics: IncompleteRead"):
            Server(process, f"http://127.0.0.1:{there.server_port}", Path("log")).get("/metrics")
