"""The benchmark of quantised weights and adapters: what an adapter changes, and what is said of the figures."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from benchmarks.checkpoint import Geometry, write_fox
from benchmarks.weights import projections, table, write_adapter

SMALL = Geometry(layers=2, hidden=128, heads=2, vocab=512)


def test_adapters_fit_the_checkpoint(tmp_path: Path) -> None:
    write_fox(tmp_path, SMALL)
    weights = load_file(tmp_path / "model.safetensors")
    write_adapter(tmp_path / "adapter", "fox", SMALL, rank=8)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    assert len(changed) == 2 * 7  # q, k, v, output gate, o; gate and up in one, down
    for name in changed:
        rows, columns = weights[f"{name.removeprefix('base_model.model.')}.weight"].shape
        assert adapter[f"{name}.lora_A.weight"].shape == (8, columns)
        assert adapter[f"{name}.lora_B.weight"].shape == (rows, 8)
    assert len(projections("llama", SMALL)) == 2 * 7


def test_table() -> None:
    """Each figure beside the same model's without; adapters beside as many requests without."""
    options = {"geometry": "small", "prompt": 1024, "rank": 16}
    systems = {
        "fox": {"alone": {"token_ms": 1.0}, "eight": {"token_ms": 2.0}},
        "fox-fp8": {"alone": {"token_ms": 0.75}},
        "fox-adapters": {"adapters": {"token_ms": 2.2}},
        "llama-fp8": {"alone": {"token_ms": 0.5}},
    }
    lines = table({"options": options, "systems": systems}).splitlines()
    assert "| fox-fp8 | 0.750 (0.75x) |  |  |" in lines
    assert "| fox-adapters |  |  | 2.200 (1.10x) |" in lines
    assert "| llama-fp8 | 0.500 |  |  |" in lines
