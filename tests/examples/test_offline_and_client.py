"""What examples/offline.py and examples/client.py are given to read, and how the client ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import offline
import pytest

from tests.support import ROOT, patience

CLIENT = [sys.executable, str(ROOT / "examples" / "client.py")]


def test_a_file_has_a_prompt_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes("\ufefffirst\u2028still\r\n\r\n  \nsecond\x0cstill\n".encode())
    monkeypatch.setattr(sys, "argv", ["offline.py", "--prompt=zeroth", f"--prompts-file={tmp_path / 'p.txt'}"])
    assert offline.arguments().prompt == ["zeroth", "first\u2028still", "second\x0cstill"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("latin.txt", "latin.txt is not UTF-8 text, from byte 3 on: save it as UTF-8."),
        ("folder.txt", "folder.txt is not a file."),
        ("link.txt", "link.txt is a link to nothing."),
        ("none.txt", "none.txt is not a file."),
        ("empty.txt", "empty.txt has no prompts: it has nothing but empty lines."),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.setattr(sys, "argv", ["offline.py", f"--prompts-file={tmp_path / name}"])
    with pytest.raises(SystemExit) as ended:
        offline.arguments()
    found = capsys.readouterr().err
    assert ended.value.code == 2 and found.count("\n") == 1 and said in found


def test_text_for_a_model_is_utf8(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["offline.py", "--prompt", os.fsdecode(b"caf\xe9")])
    with pytest.raises(SystemExit):
        offline.arguments()
    assert "--prompt is 'caf\\udce9': it must be UTF-8." in capsys.readouterr().err
    command = [*CLIENT, "--base-url=http://127.0.0.1:9/v1"]
    for content, code, said in (
        (b"caf\xe9", 1, "The text on standard input is not UTF-8 text, from byte 3 on: save it as UTF-8.\n"),
        ("café".encode(), 1, "client: no server answers at http://127.0.0.1:9/v1 (Connection error.)\n"),
    ):
        done = subprocess.run(command, input=content, capture_output=True)
        assert (done.returncode, done.stderr.decode()) == (code, said)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:800a/v1", "Invalid port: '800a'"),
        ("http://127.0.0.300/v1", "Invalid IPv4 address: '127.0.0.300'"),
        ("http://a..b/v1", "label empty or too long"),
    ],
)
def test_an_address_that_none_can_be_is_named(address: str, said: str) -> None:
    done = subprocess.run([*CLIENT, f"--base-url={address}", "x"], capture_output=True, text=True)
    wanted = f"client.py: --base-url is '{address}': it must be an address such as http://127.0.0.1:8000/v1 ("
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(wanted) and said in done.stderr


class Endless(BaseHTTPRequestHandler):
    """A server that begins to answer and does not come to an end."""

    protocol_version = "HTTP/1.1"
    interrupted: threading.Event

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps({'choices': [{'index': 0, 'text': 'first'}]})}\n\n".encode())
        self.interrupted.wait(patience(60))

    def log_message(self, *_: object) -> None:
        """Nothing: standard error is the test's."""


def test_an_interrupted_stream_ends_without_a_traceback() -> None:
    Endless.interrupted = threading.Event()
    with HTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        address = f"--base-url=http://127.0.0.1:{server.server_port}/v1"
        process = subprocess.Popen(
            [*CLIENT, address, "--model=m", "x"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where the tests run in the background, they ignore the signal, and what they start would as well.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None and process.stdout.read(5) == b"first"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=patience(60))
        Endless.interrupted.set()
    assert (process.returncode, said) == (130, b"\nclient: interrupted.\n")
