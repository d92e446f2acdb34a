"""What the clients of a killed server notice: an answer that breaks off, silence, and service that goes on."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import kill_clients
from benchmarks.kill_clients import Client, Newcomers, described
from benchmarks.kills import until
from tests.support import patience

CHOICE = {"index": 0, "text": "x", "finish_reason": None}


class Answers(BaseHTTPRequestHandler):
    """Begins every stream, and then breaks it off or is silent, as the model's name says; "whole" is answered."""

    silence_over: threading.Event

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked["model"] == "broken":
            self.send_error(500, "the engine is dead")
            return
        body = json.dumps({"id": "a", "object": "text_completion", "created": 0, "model": "m", "choices": [CHOICE]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if asked.get("stream") else "application/json")
        self.end_headers()
        self.wfile.write(f"data: {body}\n\n".encode() if asked.get("stream") else body.encode())
        self.wfile.flush()
        if asked["model"] == "silent":
            self.silence_over.wait()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    over = threading.Event()
    monkeypatch.setattr(Answers, "silence_over", over, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()


def test_an_answer_that_breaks_off_is_an_error(url: str) -> None:
    client = Client(url, "cut off", 4, timeout=patience(20))
    client.start()
    client.join(patience(20))
    assert client.answering.is_set() and client.ended_at is not None and not client.waits
    assert client.error == "ConnectionError: the stream ended in the middle of an answer"


def test_a_silent_server_is_noticed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill_clients, "RECENT_S", 0.3)
    client = Client(url, "silent", 4, timeout=patience(20))
    client.start()
    assert client.answering.wait(patience(20))
    assert until(lambda: client.waits, patience(20)) is not None
    Answers.silence_over.set()
    client.join(patience(20))
    assert client.error and not client.waits


def test_newcomers_say_whether_they_are_served(url: str) -> None:
    whole, broken = Newcomers(url, "whole", timeout=patience(20)), Newcomers(url, "broken", timeout=patience(20))
    for newcomers in (whole, broken):
        newcomers.start()
    assert until(lambda: whole.served, patience(20)) is not None
    assert until(lambda: broken.errors.total() > 1, patience(20)) is not None
    assert not broken.served
    found = whole.stop()
    assert found["answered"] and found["last_answer_s"] >= found["longest_gap_s"] and not found["errors"]
    found = broken.stop()
    assert found["answered"] == 0 and found["last_answer_s"] is None
    (error,) = found["errors"]
    assert error.startswith("InternalServerError: ")


def test_errors_that_differ_in_a_request_alone_are_the_same() -> None:
    errors = {described(RuntimeError(f"the engine is dead (request {uuid.uuid4()})")) for _ in range(3)}
    assert errors == {"RuntimeError: the engine is dead (request ID)"}
