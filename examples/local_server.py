"""A server of this machine that a program starts, asks and stops: the demo's, and those of some benchmarks."""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.metadata
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from vllm_fox.cpu import KV_CACHE_SPACE, prepare_cpu_environment
from vllm_fox.registration import register_configs

MODEL_NAME = "demo"
# Loopback only, whatever proxy the environment names.
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(Exception):
    """Something about a server that a user can understand and act upon."""


@dataclass(frozen=True)
class Checkpoint:
    """What a server is started with.

    Attributes:
        context: longest request that is served.
        kv_bytes: KV memory, for four contexts in bfloat16. That is small enough for the share in use to say
            something, and large enough for all prompts of the demo without forgetting.
    """

    folder: Path
    context: int
    kv_bytes: int

    @staticmethod
    def of(folder: Path, config: Any) -> Checkpoint:
        context = min(4096, config.max_position_embeddings)
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 4 * config.num_hidden_layers * kv_heads * head_dim
        return Checkpoint(folder, context, 4 * context * token_bytes)


def read_config(folder: Path) -> Any:
    """The config.json of a checkpoint. Raises ServerError if there is none."""
    if not (folder / "config.json").is_file():
        raise ServerError(f"--model is {folder}, which has no config.json: give the folder of a checkpoint.")
    register_configs()
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ServerError(f"--model is {folder}: {error}") from None


@dataclass
class Server:
    """A running ``vllm serve``."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The answer to a GET, or to a POST of ``body`` as JSON.

        Raises:
            OSError: none has come, or not all of it.
        """
        request = urllib.request.Request(
            self.url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _direct.open(request, timeout=30) as answer:
                return answer.read()
        except http.client.HTTPException as error:  # it ended in the middle of its answer
            raise ConnectionError(f"{self.url}{path}: {error}") from error

    def check(self, patience: float = 0) -> None:
        """Raise ServerError, quoting the log, if the server has ended or does within ``patience`` seconds."""
        try:
            code = self.process.wait(patience) if patience else self.process.poll()
        except subprocess.TimeoutExpired:
            return
        if code is not None:
            raise ServerError(f"the server ended with exit status {code}. {self.log_end()}")

    def log_end(self) -> str:
        """The first error of the log, of which later ones are mostly consequences, and the last lines."""
        lines = [line[:200] for line in self.log.read_text(errors="replace").splitlines()]
        errors = (line for line in lines if re.search(r"\w(Error|Exception): ", line))
        cause = next((line for line in errors if not re.search(r"\b(INFO|WARNING)\b", line)), "(none)")
        tail = "\n".join(f"    {line}" for line in lines[-15:])
        return f"The first error in its log:\n    {cause}\nThe log ({self.log}) ends:\n{tail}"


def free_port() -> int:
    """A TCP port that nothing listens on, and that no program is given that leaves the choice to the system.

    So it stays free until the program is up for which it is meant.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # below are those of Ray, above the system's
        with socket.socket() as free:
            try:
                free.bind(("", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port


def server_command(model: Checkpoint, port: int, *options: str) -> list[str]:
    script = Path(sys.executable).with_name("vllm")
    # -P: without it the folder that the program is run from would come before the installed packages.
    vllm = [str(script)] if script.exists() else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    command = [*vllm, "serve", str(model.folder), "--served-model-name", MODEL_NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", str(model.context), "--max-num-seqs", "16"]
    command += ["--kv-cache-memory-bytes", str(model.kv_bytes), "--disable-uvicorn-access-log"]
    command.append("--enable-prompt-tokens-details")  # says how many tokens were found in the cache
    if "cpu" in importlib.metadata.version("vllm"):
        command.append("--enforce-eager")  # compiling takes a CPU longer than answers are worth
    else:
        # What vLLM wants to find free on a GPU, where others may compute too.
        command += ["--gpu-memory-utilization", "0.1"]
    return [*command, *options]


def server_environment() -> dict[str, str]:
    environment = dict(os.environ, HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    prepare_cpu_environment(environment)
    del environment[KV_CACHE_SPACE]  # would override --kv-cache-memory-bytes
    # Longer than clients keep idle connections, 5 seconds. vLLM's own choice is as long, so that a client may send
    # a request on a connection which the server closes at that moment.
    environment.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "60")
    return environment


@contextlib.contextmanager
def running_server(model: Checkpoint, log: Path, *options: str) -> Iterator[Server]:
    """Start the server, and stop it with all its processes when the block is left, however it is left.

    Args:
        options: more of ``vllm serve``.
    """
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            server_command(model, port, *options),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(),
            start_new_session=True,  # a group of its own, so that it can be ended as a whole
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """End a process and its group: politely, and after ``patience`` seconds not."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_healthy(server: Server, timeout: float) -> None:
    begin = time.monotonic()
    while True:
        server.check()
        elapsed = time.monotonic() - begin
        with contextlib.suppress(OSError):
            server.get("/health")
            status(f"the server is ready after {elapsed:.0f} s", end=True)
            return
        if elapsed > timeout:
            raise ServerError(f"the server was not ready after {timeout:.0f} s; its log is {server.log}")
        status(f"starting the server: {elapsed:.0f} s (about a minute on a small machine)")
        time.sleep(0.5)


def status(text: str, end: bool = False) -> None:
    """A line of progress: rewritten on a terminal; elsewhere only the last one is printed."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="\n" if end else "", flush=True)
    elif end:
        print(text, flush=True)
