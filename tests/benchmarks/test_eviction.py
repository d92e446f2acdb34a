"""What the benchmark of decoders that evict says of the figures that it has saved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import eviction
from benchmarks.record import save


def full(speed: float, running: float, kv: float, decode_ms: float | None) -> dict[str, Any]:
    return {
        "output_tokens_per_second": speed,
        "mean_running": running,
        "peak_running": int(2 * running),
        "kv_bytes_per_request": kv,
        "decode_ms": decode_ms,
        "preemptions": 0,
        "complete": decode_ms is not None,
    }


def test_a_saved_run_is_told_beside_the_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [{"prompt": 2048, "first_token_ms": 40.0, "per_token_ms": 8.0}]
    faster = [{"prompt": 2048, "first_token_ms": 30.0, "per_token_ms": 6.0}]
    systems = {
        "dense": {"alone": {"lengths": alone}, "full 8192": full(1000.0, 20.0, 2**30, 12.0)},
        "evicting": {"alone": {"lengths": faster}, "full 8192": full(2500.0, 100.0, 2**28, None)},
    }
    options = {"geometry": "qwen3-8b", "window": 512, "kept": 0.125, "kv_gib": 16.0}
    save(tmp_path / "run.json", {"options": options, "systems": systems})
    argv = ["eviction", f"--report={tmp_path / 'run.json'}", f"--plot={tmp_path / 'run.png'}"]
    monkeypatch.setattr(sys, "argv", argv)
    pytest.importorskip("matplotlib")
    eviction.main()
    said = capsys.readouterr().out
    assert "evicts 87.5% of the tokens. KV memory of each: 16 GiB." in said
    assert "first token      30.0 ms (0.75x), each after   6.000 ms (0.75x)" in said
    assert "2,500 tokens/s (2.50x), 100 running on average (5.00x), 200 at most (5.00x)" in said
    assert "256.00 MiB of KV a request (0.25x), decode step none, 0 preempted, stopped by the time limit" in said
    assert (tmp_path / "run.png").stat().st_size > 1000
