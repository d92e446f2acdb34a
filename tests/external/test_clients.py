"""Clients as they are in the field, with real servers of both families: the ``openai`` library with its retries and
timeouts, clients that hang up, and the LiteLLM gateway. Whatever they do, all pages are given back.

LiteLLM is not among the packages for development, and its requirements contradict theirs. ``pipx install
'litellm[proxy]'`` gives it an environment of its own; the tests look for the command ``litellm`` on PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from local_server import free_port

from tests.support import patience
from vllm_fox.cli.app import main

from .serving import START_S, TEMPLATE, Program, metrics, running, serve_command, wait_until_idle

NAMES = ("fox-tiny", "dcp-tiny")
CONTEXT = 2048
ANSWER_S = 60
"""Longest that a short answer may take."""
PROMPT = "def add(a, b):\n    "
TOKENS = 12
LONG = {"prompt": "import os\n", "max_tokens": CONTEXT - 48, "temperature": 0, "extra_body": {"ignore_eos": True}}
"""A request of so many steps that it takes more than five seconds."""
TOO_LONG = "x = 1\n" * CONTEXT
TRIES = 10
"""Attempts at what a busy machine may spoil: a server that stands still then sends many steps in one chunk."""


class Server(NamedTuple):
    """A running server.

    Attributes:
        first: the answer to a client that asked for :data:`PROMPT` before the server was up, and its attempts.
    """

    name: str
    program: Program
    first: Future[tuple[str, int]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.program.port}/v1"

    def client(self, retries: int = 0, timeout: float = ANSWER_S) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=retries, timeout=patience(timeout))


class Attempts(NamedTuple):
    """A client that counts what it sends."""

    client: openai.OpenAI
    sent: list[httpx.Request]
    again: threading.Event


def counting(url: str, retries: int, timeout: float) -> Attempts:
    """A client with retries; ``again`` is set when it sends a second request."""
    sent: list[httpx.Request] = []
    again = threading.Event()

    def count(request: httpx.Request) -> None:
        sent.append(request)
        if len(sent) > 1:
            again.set()

    http = openai.DefaultHttpxClient(event_hooks={"request": [count]})
    client = openai.OpenAI(
        base_url=url, api_key="none", max_retries=retries, timeout=patience(timeout), http_client=http
    )
    return Attempts(client, sent, again)


def complete(client: openai.OpenAI, name: str) -> str:
    """A short greedy completion."""
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == TOKENS
    return answer.choices[0].text


def chat(client: openai.OpenAI, name: str) -> str | None:
    """The same, by chat."""
    messages = [{"role": "user", "content": PROMPT}]
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=TOKENS, temperature=0)
    return answer.choices[0].message.content


def streamed(client: openai.OpenAI, name: str) -> tuple[list[str], list[str]]:
    """What the chunks of a streamed completion and of a streamed chat say."""
    texts = client.completions.create(model=name, prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True)
    messages = [{"role": "user", "content": PROMPT}]
    said = client.chat.completions.create(
        model=name, messages=messages, max_tokens=TOKENS, temperature=0, stream=True
    )
    return (
        [choice.text or "" for chunk in texts for choice in chunk.choices],
        [choice.delta.content or "" for chunk in said for choice in chunk.choices],
    )


def check_streams(client: openai.OpenAI, name: str, text: str) -> None:
    """Streams say this text in more than one chunk."""
    for _ in range(TRIES):
        found = streamed(client, name)
        assert ["".join(chunks) for chunks in found] == [text] * 2
        if all(len([chunk for chunk in chunks if chunk]) > 1 for chunks in found):
            return
    raise AssertionError(found)


def hang_up(client: openai.OpenAI, name: str, chunks: int) -> None:
    """Ask for a long stream, and go after some chunks of it."""
    for _ in range(TRIES):
        with client.completions.create(model=name, stream=True, **LONG) as stream:
            for number, _ in enumerate(stream, 1):
                if number == chunks:
                    return
    raise AssertionError("every stream ended before the client hung up")


@pytest.fixture(scope="module")
def servers(
    fox_tiny: Path, dcp_tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """A server of each model. Clients ask before they are up, as while a server is restarted, and try again."""
    folder = tmp_path_factory.mktemp("servers")
    (folder / "chat.jinja").write_text(TEMPLATE)
    options = ["--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--chat-template", "chat.jinja"]
    options += ["--shutdown-timeout", str(int(patience(ANSWER_S)))]

    def ask(name: str, asker: Attempts) -> tuple[str, int]:
        return complete(asker.client, name), len(asker.sent)

    with ExitStack() as stack:
        askers = stack.enter_context(ThreadPoolExecutor(len(NAMES)))
        found = {}
        for name, model in zip(NAMES, (fox_tiny, dcp_tiny)):
            port = free_port()
            # The pauses between attempts are 8 s at most.
            asker = counting(f"http://127.0.0.1:{port}/v1", int(patience(START_S)), ANSWER_S)
            first = askers.submit(ask, name, asker)
            assert asker.again.wait(patience(ANSWER_S))
            command = serve_command(model, name, port, *options)
            program = stack.enter_context(running(command, port, folder, VLLM_ENABLE_V1_MULTIPROCESSING="1"))
            found[name] = Server(name, program, first)
        for server in found.values():
            server.program.wait_until("/health")
            wait([server.first])  # or it would go on asking when the server is gone, and nobody could end it
        yield found


@pytest.fixture(params=NAMES)
def server(servers: dict[str, Server], request: pytest.FixtureRequest) -> Server:
    return servers[request.param]


@pytest.fixture(scope="module")
def gateway(servers: dict[str, Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a LiteLLM proxy that stands before the servers."""
    command = shutil.which("litellm")
    if command is None:
        pytest.skip("the command litellm is not on PATH: pipx install 'litellm[proxy]'")
    folder, port, key = tmp_path_factory.mktemp("gateway"), free_port(), "sk-of-the-test"
    models = "".join(
        f"  - model_name: {one.name}\n"
        f"    litellm_params: {{model: openai/{one.name}, api_base: '{one.url}', api_key: none}}\n"
        for one in servers.values()
    )
    (folder / "models.yaml").write_text(f"model_list:\n{models}")
    # Without the first it asks the network for prices, and without the second it does not start.
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MASTER_KEY": key}
    arguments = ["--config", "models.yaml", "--host", "127.0.0.1", "--port", str(port), "--telemetry", "False"]
    with running([command, *arguments], port, folder, **environment) as program:
        program.wait_until("/health/liveliness")
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=patience(ANSWER_S)
        )


@contextmanager
def stopped(program: Program) -> Iterator[None]:
    """A server that hangs: its processes are stopped, and go on in the end."""
    os.killpg(program.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(program.process.pid, signal.SIGCONT)


def test_a_client_that_asks_too_early_is_answered(server: Server) -> None:
    text, attempts = server.first.result(patience(ANSWER_S))
    assert text == complete(server.client(), server.name) and len(text) > TOKENS // 2
    assert attempts > 1
    wait_until_idle(server.program.port)


def test_streams_say_what_whole_answers_say(server: Server) -> None:
    text = complete(server.client(), server.name)
    assert chat(server.client(), server.name) == text
    check_streams(server.client(), server.name, text)
    wait_until_idle(server.program.port)


def test_top_watches_a_running_server(
    servers: dict[str, Server], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One interval of `vllm-fox top` while a request runs, against the client's own count of its tokens."""
    monkeypatch.setattr("vllm_fox.cli.metrics.TIMEOUT_S", patience(ANSWER_S))
    server = servers["fox-tiny"]
    asked = {**LONG, "max_tokens": 300, "model": server.name}
    gauges = ("requests_running", "kv_blocks_used", "pages_live")
    seen: list[dict[str, Any]] = []
    written = 0
    capsys.readouterr()
    with ThreadPoolExecutor(1) as others:
        # On a busy machine an answer may be over before anything was looked at.
        for _ in range(TRIES):
            running = others.submit(server.client().completions.create, **asked)  # type: ignore[call-overload]
            while not running.done():
                assert main(["top", server.url, "--once", "--interval", "0.3", "--json"]) == 0
                seen.append(json.loads(capsys.readouterr().out))
            written += running.result().usage.completion_tokens
            # The gauges of a view are not all of the same step.
            if all(any(view[key] for view in seen) for key in gauges):
                break
    for key in gauges:
        assert max(view[key] for view in seen) >= 1, (key, seen)
    assert {view["model"] for view in seen} == {server.name}
    assert max(view["generated_tokens_per_s"] for view in seen) > 0
    assert sum(view["generated_tokens_per_s"] * view["interval_s"] for view in seen) <= written * (1 + 1e-9)


def test_requests_that_time_out_are_aborted(server: Server) -> None:
    before = metrics(server.program.port)["fox_kv_pages_allocated"]
    client, sent, _ = counting(server.url, retries=2, timeout=ANSWER_S)
    # A limit that followed the speed of a busy machine could be longer than the answers take once it is idle again.
    hasty = client.with_options(timeout=httpx.Timeout(client.timeout, read=0.3))
    limit = time.monotonic() + patience(ANSWER_S)
    aborted = False
    # A busy server may not have begun, and a client that stands still finds the answers when it looks for them.
    while not aborted or metrics(server.program.port)["fox_kv_pages_allocated"] == before:
        assert time.monotonic() < limit
        sent.clear()
        try:
            hasty.completions.create(model=server.name, **LONG | {"prompt": [PROMPT] * 8})
        except openai.APITimeoutError:
            aborted = True
            assert len(sent) == 3
    wait_until_idle(server.program.port)


def test_a_hanging_server_answers_a_later_attempt(server: Server) -> None:
    want = complete(server.client(), server.name)
    client, sent, again = counting(server.url, retries=60, timeout=1)
    with ThreadPoolExecutor(1) as pool:
        with stopped(server.program):
            answer = pool.submit(complete, client, server.name)
            assert again.wait(patience(ANSWER_S))
        assert answer.result() == want
    assert len(sent) > 1
    wait_until_idle(server.program.port)


def test_clients_that_hang_up_disturb_nobody(server: Server) -> None:
    want = complete(server.client(), server.name)
    with ThreadPoolExecutor(8) as pool:
        gone = [pool.submit(hang_up, server.client(), server.name, chunks) for chunks in (1, 2, 5, 10, 20)]
        stay = [pool.submit(complete, server.client(), server.name) for _ in range(3)]
        for one in gone:
            one.result()
        assert [one.result() for one in stay] == [want] * 3
    wait_until_idle(server.program.port)


def test_too_long_a_prompt_is_a_bad_request(server: Server) -> None:
    said = rf"^Error code: 400 - This model's maximum context length is {CONTEXT} tokens\."
    with pytest.raises(openai.BadRequestError, match=said):
        server.client(retries=3).completions.create(model=server.name, prompt=TOO_LONG, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match=said):
        server.client(retries=3).completions.create(model=server.name, prompt=TOO_LONG, max_tokens=1, stream=True)
    assert complete(server.client(), server.name)


def test_a_gateway_changes_nothing(server: Server, gateway: openai.OpenAI) -> None:
    text = complete(server.client(), server.name)
    assert complete(gateway, server.name) == text
    assert chat(gateway, server.name) == text
    check_streams(gateway, server.name, text)


def test_errors_pass_a_gateway(server: Server, gateway: openai.OpenAI) -> None:
    said = f"This model's maximum context length is {CONTEXT} tokens."
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=said):
            gateway.completions.create(model=server.name, prompt=TOO_LONG, max_tokens=1, stream=stream)
    with pytest.raises(openai.BadRequestError, match="temperature must be non-negative, got -1.0"):
        gateway.completions.create(model=server.name, prompt=PROMPT, max_tokens=1, temperature=-1)
    assert complete(gateway, server.name)


def test_who_hangs_up_on_a_gateway_gives_pages_back(server: Server, gateway: openai.OpenAI) -> None:
    before = metrics(server.program.port)["fox_kv_pages_allocated"]
    with ThreadPoolExecutor(4) as pool:
        for one in [pool.submit(hang_up, gateway, server.name, chunks) for chunks in (1, 3, 9, 27)]:
            one.result()
    assert metrics(server.program.port)["fox_kv_pages_allocated"] > before
    wait_until_idle(server.program.port)


def test_a_server_that_is_told_to_end_finishes_its_answers(server: Server) -> None:
    """The last test, since it ends the servers.

    Without ``--shutdown-timeout`` vLLM kills its engine at once, whatever the model, and at times nobody tells the
    client, which then waits for its own timeout.
    """
    request = {**LONG, "max_tokens": 100}
    want = server.client().completions.create(model=server.name, **request).choices[0].text
    with server.client().completions.create(model=server.name, stream=True, **request) as stream:
        chunks = iter(stream)
        chunk = next(chunks)
        text = chunk.choices[0].text
        server.program.process.terminate()
        for chunk in chunks:
            text += chunk.choices[0].text
    assert text == want and chunk.choices[0].finish_reason == "length"
    assert server.program.process.wait(patience(ANSWER_S)) == 0
