"""Programs that listen on a port of this machine, and what a running ``vllm serve`` says of itself."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.support import patience

START_S, IDLE_S, ANSWER_S = 180, 60, 10
IN_USE = ("num_requests_running", "num_requests_waiting", "fox_kv_pages_live", "kv_cache_usage_perc")
"""Metrics that are 0 of an idle server."""

VLLM = (sys.executable, "-P", "-m", "vllm.entrypoints.cli.main")
"""The command ``vllm`` of this interpreter."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template for models that continue text, since the shipped checkpoints have none: what is said, no more."""


class Program(NamedTuple):
    """A running program, which leads a process group of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def wait_until(self, path: str) -> None:
        """Wait until it answers GET requests of ``path`` with success."""
        answer = patience(ANSWER_S)
        limit = time.monotonic() + patience(START_S)
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=answer).is_success:
                    return
            assert self.process.poll() is None and time.monotonic() < limit, self.log.read_text()[-6000:]
            time.sleep(0.5)


@contextlib.contextmanager
def running(command: Sequence[str], port: int, folder: Path, **environment: str) -> Iterator[Program]:
    """The program of a command; in the end all of its processes are killed."""
    log = folder / f"{port}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield Program(process, port, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def serve_command(model: Path, name: str, port: int, *options: str) -> list[str]:
    """The command of a server in float32 that calls its model so."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(model),
        "--served-model-name",
        name,
    ]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *options]


def metrics(port: int, timeout: float | None = None) -> dict[str, float]:
    """What a server's /metrics say, added up over labels, by names without ``vllm:`` and ``_total``.

    Args:
        port: of the server.
        timeout: seconds that it may take; by default, what this machine needs just now.
    """
    timeout = patience(ANSWER_S) if timeout is None else timeout
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=timeout).raise_for_status().text
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (family.name, f"{family.name}_total"):
                name = family.name.removeprefix("vllm:")
                sums[name] = sums.get(name, 0.0) + sample.value
    return sums


def wait_until_idle(port: int) -> None:
    """Wait until a server has no request and no page in use, by its own metrics."""
    answer = patience(ANSWER_S)
    limit = time.monotonic() + patience(IDLE_S)
    now: dict[str, float] = {}
    while True:
        with contextlib.suppress(httpx.TimeoutException):
            now = metrics(port, answer)
            if not any(now[name] for name in IN_USE):
                return
        assert time.monotonic() < limit, {name: now.get(name) for name in IN_USE}
        time.sleep(0.2)
