"""Two engines behind one server: both answer, and the death of one is an error to clients, not a hang."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
from local_server import free_port
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engines import processes_under
from tests.support import patience

START_S, END_S = 180, 60


class Server(NamedTuple):
    """A running server."""

    process: subprocess.Popen[bytes]
    client: openai.OpenAI
    model: str

    def complete(self, prompt: str, tokens: int) -> str:
        """The text of a greedy completion of exactly so many tokens."""
        answer = self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.choices[0].finish_reason == "length"
        return answer.choices[0].text

    def read(self, name: str, **labels: str) -> dict[str, float]:
        """One of our metrics, by engine."""
        text = self.client.get("/../metrics", cast_to=str)
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            sample.labels["engine"]: sample.value
            for sample in samples
            if sample.name == f"vllm:fox_{name}" and labels.items() <= sample.labels.items()
        }


@pytest.fixture(scope="module")
def server(fox_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    log_path = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(fox_tiny)]
    command += ["--data-parallel-size", "2", "--api-server-count", "1", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=log_path.parent, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=patience(END_S)
    )
    try:
        limit = time.monotonic() + patience(START_S)
        while True:
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            assert process.poll() is None and time.monotonic() < limit, log_path.read_text()[-6000:]
            time.sleep(0.5)
        yield Server(process, client, str(fox_tiny))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


PROMPTS = [f"def function_{n}(a, b):\n    " for n in range(6)]


def test_both_engines_answer_as_one_would(server: Server) -> None:
    alone = [server.complete(prompt, 12) for prompt in PROMPTS]
    before = server.read("kv_pages_allocated_total")
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: server.complete(prompt, 12), PROMPTS))
    assert together == alone
    after = server.read("kv_pages_allocated_total")
    assert sorted(after) == ["0", "1"]
    for name, labels in (("kv_layer_pages_dense", {"layer": "3"}), ("kv_bytes_saved", {})):
        assert server.read(name, **labels) == {"0": 0.0, "1": 0.0}, "all requests have ended"
    assert all(pages > 0 for pages in server.read("attention_pages_total", phase="decode").values())
    assert all(after[engine] > before[engine] for engine in after)


def test_a_dead_engine_is_an_error_not_a_hang(server: Server) -> None:
    """vLLM ends the server when one of its engines dies; a request under way on the other is aborted before."""
    ends: dict[int, list[str | Exception]] = {0: [], 1: []}
    streaming = threading.Semaphore(0)

    def stream(prompt: str, rank: int) -> None:
        try:
            answer = server.client.completions.create(
                model=server.model,
                prompt=prompt,
                max_tokens=8000,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
                extra_headers={"X-data-parallel-rank": str(rank)},
            )
            next(answer)
            streaming.release()
            *_, last = answer
            ends[rank].append(str(last.choices[0].finish_reason))
        except openai.OpenAIError as error:
            ends[rank].append(error)

    # Stopped, it cannot come to the end of an answer before it is killed, however late that is on a busy machine.
    doomed, *_ = processes_under(server.process.pid, "EngineCore_DP1")
    doomed.suspend()
    clients = [
        threading.Thread(target=stream, args=(prompt, rank), daemon=True)
        for prompt, rank in zip(PROMPTS[:4], (1, 1, 0, 0), strict=True)
    ]
    for client in clients:
        client.start()
    limit = time.monotonic() + patience(END_S)
    for _ in range(2):
        assert streaming.acquire(timeout=limit - time.monotonic()), ends
    doomed.kill()
    for client in clients:
        client.join(limit - time.monotonic())
    assert [len(found) for found in ends.values()] == [2, 2], "a client still waits"
    # The other engine may come to the end of an answer before.
    assert all(end in ("abort", "length") or isinstance(end, Exception) for end in ends[0]), ends
    assert all(end == "abort" or isinstance(end, Exception) for end in ends[1]), ends
    assert any(isinstance(end, Exception) for end in ends[1]), ends
    assert server.process.wait(max(0.0, limit - time.monotonic())) is not None
