"""The demo's arithmetic and its failures. The demo itself, with a real server, is ``make demo``."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import ROOT

METRICS = """\
# HELP vllm:fox_kv_pages_allocated_total Pages.
# TYPE vllm:fox_kv_pages_allocated_total counter
vllm:fox_kv_pages_allocated_total{engine="0",model_name="fox"} 400.0
vllm:fox_kv_pages_allocated_total{engine="1",model_name="fox"} 20.0
# TYPE vllm:fox_kv_pages_released_total counter
vllm:fox_kv_pages_released_total{engine="0",model_name="fox"} 150.0
# TYPE vllm:fox_kv_pages_live gauge
vllm:fox_kv_pages_live{engine="0",model_name="fox"} 250.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="fox"} 0.125
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="64",num_gpu_blocks="101",engine="0"} 1.0
"""


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fox_demo", ROOT / "examples" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_metrics_are_read_from_the_text_of_the_server(demo: ModuleType) -> None:
    assert demo.Sample.parse(METRICS, 1.5) == demo.Sample(1.5, 420, 150, 250, 0.125)


def test_a_server_without_the_plugin_is_named_as_such(demo: ModuleType) -> None:
    with pytest.raises(demo.DemoError, match="no vllm:fox_kv_pages_live"):
        demo.Sample.parse(METRICS.replace("fox_kv_pages_live", "other"), 0)


@pytest.mark.parametrize(
    ("kv_heads", "streams"), [({}, 12), ({"num_kv_heads": 2}, 6), ({"num_kv_heads": None}, 12)]
)
def test_pages_follow_config_and_server(
    demo: ModuleType, tmp_path: Path, kv_heads: dict[str, int | None], streams: int
) -> None:
    config = {"model_type": "forgetting_transformer", "hidden_size": 128, "num_hidden_layers": 3, "num_heads": 4}
    config |= {"max_position_embeddings": 8192, **kv_heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = demo.Model.read(tmp_path)
    assert (model.streams, model.context) == (streams, 4096)
    geometry = demo.Geometry.read(model, METRICS)
    assert geometry == demo.Geometry(streams, 64, streams * 100)
    assert [geometry.pages(n) for n in (1, 64, 65)] == [streams, streams, 2 * streams]


def test_a_layer_is_a_stream_where_heads_drop_alike(demo: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "sparse_gpt2", "n_layer": 3, "block_size": 1024}')
    model = demo.Model.read(tmp_path)
    assert (model.streams, model.context, model.page) == (3, 1024, "one layer")


def test_without_release_a_request_holds_all_it_was_ever_given_until_its_end(demo: ModuleType) -> None:
    geometry = demo.Geometry(streams=10, page_size=64, capacity=1000)
    early = demo.Request("early", "", prompt_tokens=120, output_tokens=9, begin=0, end=5)  # 128 tokens kept
    late = demo.Request("late", "", prompt_tokens=200, output_tokens=100, begin=0, end=9)
    samples = [
        demo.Sample(1, 40, 0, 40, 0.04),
        demo.Sample(4, 60, 30, 30, 0.03),
        demo.Sample(6, 70, 40, 20, 0.02),  # early's 20 pages are back
        demo.Sample(10, 70, 40, 0, 0.0),
    ]
    assert demo.dense_peak(samples, [early, late], geometry) == 60
    assert demo.dense_peak([], [], geometry) == 0


class BusyServer:
    """Answers every other time, each time with less in use, until nothing is."""

    def __init__(self) -> None:
        self.asked = 0

    def get(self, path: str) -> bytes:
        self.asked += 1
        if self.asked % 2:
            raise TimeoutError
        return METRICS.replace("250.0", str(max(0, 8 - self.asked))).encode()

    def check(self) -> None:
        pass


def test_a_late_answer_is_waited_for(demo: ModuleType) -> None:
    watcher = demo.Watcher(server := BusyServer())
    watcher.start()
    assert not watcher.finish().live and server.asked >= 8


class CountingServer:
    """Counts a token for each character, and never ends."""

    def get(self, path: str, body: dict[str, str]) -> bytes:
        assert path == "/tokenize"
        return json.dumps({"count": len(body["prompt"])}).encode()

    def check(self, patience: float) -> None:
        pass


def test_each_turn_of_a_conversation_goes_on_from_the_last_and_has_a_line(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def send(server: CountingServer, turn: Any, max_tokens: int) -> None:
        assert max_tokens == 5
        turn.text = f"    # {turn.name}"
        turn.prompt_tokens, turn.cached_tokens = len(turn.prompt), 64 * (turn.name != "turn 1")
        turn.begin, turn.first = 1.0, 1.25

    monkeypatch.setattr(demo, "send", send)
    turns = demo.converse(CountingServer(), context=1000, max_tokens=5)
    system = turns[0].prompt.removesuffix(demo.TURNS[0])
    assert 500 < len(system) <= 600 and system.endswith("\n")
    for (before, turn), said in zip(itertools.pairwise(turns), demo.TURNS[1:], strict=True):
        assert turn.prompt == before.prompt + before.text + said

    capsys.readouterr()
    demo.print_conversation(turns)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["turn", "1", str(len(turns[0].prompt)), "0", "0.25"],
        ["turn", "2", str(len(turns[1].prompt)), "64", "0.25"],
        ["turn", "3", str(len(turns[2].prompt)), "64", "0.25"],
    ]
    assert f"found {64 / len(turns[2].prompt):.0%} of its prompt in the cache" in lines[-1]


def test_a_turn_that_fails_ends_the_conversation(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(server: CountingServer, turn: Any, max_tokens: int) -> None:
        turn.error = "out of order"

    monkeypatch.setattr(demo, "send", send)
    with pytest.raises(demo.DemoError, match="a request failed: turn 1: out of order"):
        demo.converse(CountingServer(), context=1000, max_tokens=5)


def test_maps_are_written_of_requests_and_named(
    demo: ModuleType, dcp_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = demo.Model.read(dcp_tiny)
    assert model.has_maps
    requests = [
        demo.Request("early", "import os\n" * 20, text="import sys\n"),
        demo.Request("late", "x = 1\n" * 30),
    ]
    written = demo.write_maps(model, requests, tmp_path / "maps")
    assert [path.name for path, _ in written] == ["dcp-tiny-early.html", "dcp-tiny-late.html"]
    assert "What dcp-tiny (early) forgets" in written[0][0].read_text()
    assert all(0 < share < 1 for _, share in written)
    capsys.readouterr()
    demo.print_maps(written)
    said = capsys.readouterr().out
    assert all(f"{path}  ({share:.0%} given back at the end)" in said for path, share in written)


def test_the_cost_is_that_of_models_that_can_keep_everything(
    demo: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [demo.Request("one", Path(demo.__file__).read_text()[:6000], text="import sys\n")]
    models = [demo.Model.read(folder) for folder in demo.MODELS]
    assert [model.evicts for model in models] == [False, False, True]
    ours, dense = demo.cost_of_forgetting(models[2], requests)
    assert 0 < dense < ours < dense + 0.5
    demo.print_cost((2.5, 2.375))
    said = capsys.readouterr().out
    assert "+0.125 nats a token on these texts (2.500, and 2.375 if the model keeps everything)" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "demo: --model is /nowhere, which has no config.json"),
        (["--max-tokens", "0"], "--max-tokens is 0: it must be from 1 to 900."),
    ],
)
def test_mistakes_give_one_sentence(arguments: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr
