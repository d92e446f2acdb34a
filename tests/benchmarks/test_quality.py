"""The benchmark of what eviction costs: its tasks, its ways to compute, and a run of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks import quality
from benchmarks.record import saved
from tests.support.evicting import VARIANTS, Made, make_evicting
from vllm_fox.hf import EvictingDecoderForCausalLM


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_evicting(tmp_path_factory.mktemp("made"), VARIANTS["llama-adapter"])


def test_a_window_is_attention_to_so_many_tokens(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PyTorch's own attention with the mask of a window behind the first tokens, in all layers."""
    model: Any = EvictingDecoderForCausalLM.from_pretrained(made.served, dtype=torch.float32).eval()
    ids = torch.randint(1, 257, (1, 120), generator=torch.Generator().manual_seed(0))
    for window, sinks in ((20, 0), (9, 4)):
        with quality.windowed(model, window, sinks), torch.no_grad():
            found = model(ids).logits
        position = torch.arange(120)
        back = position[:, None] - position
        seen = (back >= 0) & ((back <= window) | (position < sinks))

        def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            heads = (x.transpose(0, 1)[None] for x in (q, k, v))
            return scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)  # noqa: B023

        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr("vllm_fox.hf.evicting.modeling.fading_attention", masked)
            torch.testing.assert_close(found, model(ids).logits, atol=1e-4, rtol=1e-4)
    # What the model decides by itself is as before.
    with torch.no_grad():
        assert 0 < model.evicted(ids).float().mean() < 1


def test_a_run(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(Path(quality.__file__).read_text())
    argv = ["quality", str(made.served), f"--text={tmp_path / 'text'}", f"--json={tmp_path / 'found.json'}"]
    argv += ["--context=256", "--windows=3", "--questions=2", "--tasks", "needle", "copying"]
    argv.append(f"--plot={tmp_path / 'found.png'}")
    monkeypatch.setattr(sys, "argv", argv)
    quality.main()
    (figures,) = saved(tmp_path / "found.json")["models"].values()
    said = capsys.readouterr().out
    assert all(name in said for name in (*quality.SYSTEMS, "needle", "copying")) and "variables" not in said
    assert made.window < figures["held"] < 256
    model: Any = EvictingDecoderForCausalLM.from_pretrained(made.served, dtype=torch.float32).eval()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(made.served)((tmp_path / "text" / "one.txt").read_text()).input_ids[:768]
    for name, evicts in (("evicting", True), ("without eviction", False)):
        model.set_evicts(evicts)
        rows = torch.tensor(tokens).view(3, 256)
        with torch.no_grad():
            losses = [cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).item() for ids in rows]
        # Parts of a text may differ in length by a token.
        assert figures["systems"][name]["loss"] == pytest.approx(sum(losses) / 3, rel=2e-2)
    assert (tmp_path / "found.png").stat().st_size > 1000
