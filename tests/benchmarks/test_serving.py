"""What limits a run of the serving benchmark, and how a report says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import record, serving
from benchmarks.checkpoint import Geometry, fox_parameters, llama_parameters

SIZE = Geometry(layers=2, hidden=256, heads=4)


def run_of(system: str, **options: Any) -> dict[str, Any]:
    """A saved run: 10 blocks of 64 tokens, of which a half and then all are in use."""
    given = {"layers": SIZE.layers, "hidden": SIZE.hidden, "heads": SIZE.heads, "kv_cache_dtype": "auto"}
    given |= {f"{kind}_parallel_size": 1 for kind in ("tensor", "pipeline", "data")} | {"executor": None}
    total = {"complete": True, "seconds": 2.0, "prompt_tokens": 900, "output_tokens": 100, "preemptions": 0}
    total |= {"output_tokens_per_second": 50.0, "peak_running": 2, "peak_kv_usage": 1.0}
    total |= {"blocks": 10, "block_tokens": 64, "steps": [(1.0, 900, 1, 2, 0.5), (1.0, 0, 99, 2, 1.0)]}
    latency = [{"prompt": 64, "first_token_ms": 3.0 if system == "dense" else 6.0, "per_token_ms": 2.0}]
    return {"system": system, "options": given | options, "result": {"latency": latency, "throughput": total}}


@pytest.mark.parametrize(
    ("system", "options", "token_bytes", "gpus"),
    [
        ("dense", {}, 2 * (2 * 256 * 2), 1),
        ("fox", {}, 2 * (2 * 256 * 2 + 4 * 4), 1),
        ("fox", {"kv_cache_dtype": "fp8"}, 2 * (2 * 256 + 4 * 4), 1),
        ("fox", {"tensor_parallel_size": 2}, 2 * (2 * 256 * 2 + 4 * 4), 2),
    ],
)
def test_the_limit_is_what_is_read_and_multiplied(
    system: str, options: dict[str, Any], token_bytes: int, gpus: int
) -> None:
    read, products = serving.limit_seconds(run_of(system, **options), copy_tbs=1e-6, tflops=1e-6)
    assert read == pytest.approx(1.5 * 640 * token_bytes / 1e6 / gpus)
    parameters = fox_parameters(SIZE) if system == "fox" else llama_parameters(SIZE)
    head = SIZE.vocab * SIZE.hidden
    assert products == pytest.approx(2 * ((parameters - 2 * head) * 1000 + head * 100) / 1e6 / gpus)


def test_a_report_compares_with_the_dense_model_and_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for system in ("dense", "fox"):
        record.save(tmp_path / f"{system}.json", run_of(system))
    files = {system: str(tmp_path / f"{system}.json") for system in ("dense", "fox")}
    monkeypatch.setattr("sys.argv", ["serving", "report", *files.values(), "--copy-tbs=0.000002", "--tflops=0.001"])
    serving.main()
    said = capsys.readouterr().out
    assert "first token      6.0 ms (2.00x dense), each after 2.000 ms (1.00x dense)" in said
    assert "dense: limit " in said and "fox: limit " in said
    monkeypatch.setattr("sys.argv", ["serving", "report", files["fox"]])
    serving.main()
    said = capsys.readouterr().out
    assert "x dense" not in said and "limit" not in said
