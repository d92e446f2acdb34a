"""The benchmark of what eviction costs: its tasks, its ways to compute, and a run of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import DynamicCache

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


@pytest.mark.parametrize("variant", ["llama-adapter", "qwen2-linear", "mistral-mlp"])
def test_the_dense_model_is_the_model_without_eviction(variant: str, tmp_path: Path) -> None:
    served = make_evicting(tmp_path, VARIANTS[variant]).served
    model: Any = EvictingDecoderForCausalLM.from_pretrained(served, dtype=torch.float32).eval()
    model.set_evicts(False)
    ids = torch.randint(1, 257, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(quality.dense_model(model)(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_borrowed_neuron_leaves_no_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = make_evicting(tmp_path, VARIANTS["qwen3-borrowed"]).served
    model: Any = EvictingDecoderForCausalLM.from_pretrained(served)
    assert quality.dense_model(model) is None
    assert "which need the dense model: a neuron of its queries decides" in capsys.readouterr().err


class Forgetful:
    """A press that keeps all but the first ``gone`` tokens of a prompt."""

    def __init__(self, gone: int) -> None:
        self.gone = gone

    @contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def forget(layer: Any, _: Any, given: dict[str, Any], __: Any) -> None:
            held = given["past_key_values"].layers[layer.layer_idx]
            held.keys, held.values = held.keys[:, :, self.gone :], held.values[:, :, self.gone :]

        hooks = [one.self_attn.register_forward_hook(forget, with_kwargs=True) for one in model.model.layers]
        yield
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("gone", [0, 33])
def test_what_follows_a_prompt_sees_what_a_press_keeps(made: Made, gone: int) -> None:
    """Beside one pass over the whole text with a mask: the prompt sees all of itself, the rest what is kept."""
    model: Any = EvictingDecoderForCausalLM.from_pretrained(made.served, dtype=torch.float32).eval()
    dense = quality.dense_model(model)
    ids = torch.randint(1, 257, (80,), generator=torch.Generator().manual_seed(0))
    found = quality.logits_after(dense, Forgetful(gone), ids[:60], ids[60:])
    seen = torch.ones(80, 80, dtype=torch.bool).tril()
    seen[60:, :gone] = False
    with torch.no_grad():
        expected = dense(ids[None], attention_mask=seen[None, None]).logits[0, 60:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", quality.PRESSES)
def test_a_press_keeps_as_many_tokens_as_asked_for(made: Made, name: str) -> None:
    package = pytest.importorskip("kvpress", reason="kvpress is not installed")
    model: Any = EvictingDecoderForCausalLM.from_pretrained(made.served, dtype=torch.float32).eval()
    dense = quality.dense_model(model)
    ids = torch.randint(1, 257, (1, 150), generator=torch.Generator().manual_seed(0))
    for kept in (20, 77, 149, 150):
        cache = DynamicCache(config=dense.config)
        with torch.no_grad(), quality.make_press(package, name, 150, kept)(dense):
            dense.model(ids, past_key_values=cache, cache_position=torch.arange(150))
        assert [layer.keys.shape[2] for layer in cache.layers] == [kept] * len(cache.layers)


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
    said, errors = capsys.readouterr()
    presses = figures["systems"].keys() - set(quality.SYSTEMS)
    assert presses == (set() if "The presses of kvpress are left out" in errors else set(quality.PRESSES))
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
