"""``vllm-fox top`` on what a real server said.

metrics/fox-tiny-1.txt and -2.txt are the /metrics of vLLM 0.32 (CPU) serving examples/fox-tiny to twelve clients,
two seconds apart, without the lines of vLLM's histograms' buckets, of creation times and of the Python process.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console

from tests.support import ROOT, patience
from vllm_fox.cli.metrics import metrics_url, sample_of, view
from vllm_fox.cli.top import table_of

from .conftest import Run, documented

RECORDED = [(ROOT / "tests" / "cli" / "metrics" / f"fox-tiny-{number}.txt").read_text() for number in (1, 2)]
ANSWER_S = 60
"""How long a server of these tests may be silent, since its process may have to wait for a CPU."""
TOP = [
    sys.executable,
    "-c",
    "import sys; from vllm_fox.cli import app, metrics;"
    f"metrics.TIMEOUT_S = {ANSWER_S}; sys.exit(app.main(['top', *sys.argv[1:]]))",
]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_fox.cli.metrics.TIMEOUT_S", ANSWER_S)


class Server(HTTPServer):
    """Answers GET /metrics with its texts in turn, and everything else with 404.

    Attributes:
        lost: bytes that it announces and does not send.
    """

    texts: list[str]
    count: Iterator[int]
    lost = 0


class Handler(BaseHTTPRequestHandler):
    """See :class:`Server`."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        server = self.server
        if self.path != "/metrics":
            self.send_error(404)
            return
        text = server.texts[next(server.count) % len(server.texts)].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text) + server.lost))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as started:
        started.texts, started.count = RECORDED, itertools.count()
        thread = threading.Thread(target=started.serve_forever, args=(0.01,))
        thread.start()
        yield started
        started.shutdown()
        thread.join()


def address(server: Server) -> str:
    return f"127.0.0.1:{server.server_port}"


def test_once(run: Run, server: Server) -> None:
    done = run("top", address(server), "--once", "--interval", "0.1")
    assert done.code == 0 and not done.err
    lines = {" ".join(line.split()) for line in done.out.splitlines()}
    assert {"examples/fox-tiny", "requests running 12 0 waiting", "KV blocks in use 28.1% 56 of 199"} <= lines
    assert "pages live 1,774 4,588 more only in the prefix cache, 6 free" in lines
    assert any(line.startswith("layers 0 to 3 ") and line.count("%") == 4 for line in lines)


def test_json_has_the_documented_keys(run: Run, server: Server) -> None:
    done = run("top", f"http://{address(server)}/v1/", "--once", "--interval", "0.1", "--json")
    found = done.json()
    assert set(found) == documented("top") and done.out.count("\n") == 1
    assert found["pages_live"] == 1774 and found["kv_blocks_used"] == 56 and found["engines"] == 1


def test_rates_are_differences_over_seconds() -> None:
    """Of the counters in the two recorded texts."""
    before, now = (sample_of(text, "url", at) for text, at in zip(RECORDED, (10.0, 12.0), strict=True))
    found = view(now, before)

    def counted(name: str, labels: str = "{") -> float:
        values = []
        for text in RECORDED:
            line = next(line for line in text.splitlines() if line.startswith(f"vllm:{name}{labels}"))
            values.append(float(line.rpartition(" ")[2]))
        return values[1] - values[0]

    assert found["pages_released_per_s"] == counted("fox_kv_pages_released_total") / 2 > 0
    assert found["pages_allocated_per_s"] == counted("fox_kv_pages_allocated_total") / 2
    assert found["generated_tokens_per_s"] == counted("generation_tokens_total") / 2 > 0
    decode = '{engine="0",model_name="examples/fox-tiny",phase="decode"} '
    dense, pruned = (counted(f"fox_attention_pages{kind}_total", decode) for kind in ("", "_pruned"))
    assert found["decode_pruned"] == pruned / dense > 0.5
    # A server that has started anew counts from 0.
    again = view(before, now)
    assert again["generated_tokens_per_s"] is None and again["pages_released_per_s"] is None
    assert "not known" in shown(again)


def test_shares_of_layers() -> None:
    """Live pages over dense ones, of all engines together; none while no request runs."""

    def pages(kind: str) -> list[float]:
        lines = re.findall(rf"^vllm:fox_kv_layer_pages_{kind}\{{.* (\S+)$", RECORDED[1], re.MULTILINE)
        return [float(value) for value in lines]

    live, dense = pages("live"), pages("dense")
    idle = re.sub(r"^(vllm:fox_kv_layer.*) \S+$", r"\1 0.0", RECORDED[1], flags=re.MULTILINE)
    for text in (RECORDED[1], RECORDED[1] + "\n" + idle.replace('engine="0"', 'engine="1"')):
        sample = sample_of(text, "url", 1.0)
        found = view(sample, sample)
        assert found["live_share_by_layer"] == [one / whole for one, whole in zip(live, dense)]
        assert found["live_share"] == sum(live) / sum(dense) and found["decode_pruned"] is None
    sample = sample_of(idle, "url", 1.0)
    assert view(sample, sample)["live_share"] is None and "no requests" in shown(view(sample, sample))


def test_many_layers_stand_in_several_lines() -> None:
    found = view(*(sample_of(RECORDED[1], "url", at) for at in (1.0, 0.0)))
    text = shown(found | {"live_share_by_layer": [layer / 20 for layer in range(17)]})
    assert "layers 0 to 7 " in text and "layers 8 to 15 " in text and "layer 16 " in text and " 80.0%" in text


def shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table_of(found))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_engines_are_added_up() -> None:
    """As data-parallel engines on one server label theirs."""
    both = RECORDED[1] + "\n" + RECORDED[1].replace('engine="0"', 'engine="1"')
    one, two = (view(sample_of(text, "url", 1.0), sample_of(text, "url", 0.0)) for text in (RECORDED[1], both))
    assert two["engines"] == 2 and two["requests_running"] == 24 and two["kv_usage"] == one["kv_usage"]
    assert two["kv_blocks"] == 2 * 199 and two["kv_blocks_used"] == 2 * 56


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://host:1/v1", "http://host:1/metrics"),
        ("http://host:1/metrics", "http://host:1/metrics"),
        ("host/behind/a/proxy", "http://host/behind/a/proxy/metrics"),
        ("[::1]:8000", "http://[::1]:8000/metrics"),
    ],
)
def test_addresses(given: str, wanted: str) -> None:
    assert metrics_url(given) == wanted


def test_what_is_no_server_of_ours(run: Run, server: Server) -> None:
    """Nobody listens; another program does; vLLM serves another model."""
    dense = "\n".join(line for line in RECORDED[0].splitlines() if "fox_kv" not in line)
    for texts, path, part in (
        (RECORDED, "/elsewhere", "answers 404"),
        (["# HELP up\nup 1\n"], "", "no metrics of vLLM"),
        (["<html>\x00 hello"], "", "no metrics of vLLM"),
        ([dense], "", "no model of vllm-fox's"),
    ):
        server.texts = texts
        done = run("top", address(server) + path, "--once", "--interval", "0.1")
        assert done.code == 1 and not done.out and done.err.count("\n") == 1, done
        assert part in done.err and address(server) in done.err
    done = run("top", "127.0.0.1:1", "--once")
    assert done.code == 1 and "No server answers at http://127.0.0.1:1/metrics" in done.err
    server.lost = 5
    done = run("top", address(server), "--once")
    assert done.code == 1 and "5 more expected" in done.err and done.err.count("\n") == 1


def interrupt(process: subprocess.Popen[str]) -> None:
    """Send SIGINT until the process ends: Python ignores one that arrives while it frees an open file."""
    limit = time.monotonic() + patience(20)
    while process.poll() is None and time.monotonic() < limit:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience(1))


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_ends_it(server: Server, options: list[str]) -> None:
    """Without a sentence or a traceback, and with all that was seen on standard output."""
    command = [*TOP, address(server), "--interval", "0.1", *options]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, they ignore the signal, and what they start would as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline()
    time.sleep(0.3)
    interrupt(process)
    out, err = process.communicate(timeout=patience(20))
    assert process.returncode == 0 and not err
    if options:
        assert all(json.loads(line)["pages_live"] for line in out.splitlines())


def test_a_server_that_ends_is_a_sentence(server: Server) -> None:
    command = [*TOP, address(server), "--interval", "0.1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()
    server.texts = [""]
    _, err = process.communicate(timeout=patience(20))
    assert process.returncode == 1 and err.count("\n") == 1 and "no vLLM server is there" in err
