"""A family of another package: found by its entry point, served by the real engine, equal to its formula."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM

import plugin_setup
from benchmarks.engines import add, engine, generate, greedy, manager, run_to_the_end, run_until_decoding
from tests.families.windowed.config import WindowedConfig
from tests.families.windowed.model import weight_shapes
from tests.support.checkpoints import make_checkpoint
from tests.support.engines import assert_all_free

WINDOWS = [24, 150]
LENGTH = 700
PAGE = 16
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the example's formula is written for a CPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("windowed")
    other = make_checkpoint(tmp_path_factory.mktemp("tokenizer"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((other / name).read_bytes())
    config = WindowedConfig(windows=WINDOWS, architectures=["WindowedForCausalLM"], bos_token_id=0, eos_token_id=0)
    config.save_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=rng) * (1 if "embed" in name else 0.2)
        for name, shape in weight_shapes(config).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """An engine in a process that has a package with our entry point installed."""
    installed = tmp_path_factory.mktemp("site")
    (installed / "windowed-1.0.dist-info").mkdir()
    (installed / "windowed-1.0.dist-info" / "METADATA").write_text("Name: windowed\nVersion: 1.0\n")
    (installed / "windowed-1.0.dist-info" / "entry_points.txt").write_text(
        "[vllm_fox.families]\nwindowed = tests.families.windowed:WINDOWED\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(installed)
        plugin_setup.register()
        with engine(checkpoint, max_model_len=1024, num_gpu_blocks_override=120) as llm:
            yield llm


def formula(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """[T] token ids to [T, vocab] log-probabilities of the next token, in float64."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    w = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    x = w["model.embed.weight"][ids]
    i, j = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    for layer in range(config["num_hidden_layers"]):
        q, k, v = (
            (x @ w[f"model.layers.{layer}.{part}_proj.weight"].T).unflatten(1, (len(WINDOWS), -1)) for part in "qkv"
        )
        outs = []
        for head, window in enumerate(config["windows"]):
            logits = q[:, head] @ k[:, head].T / q.shape[2] ** 0.5
            logits = logits.masked_fill((j > i) | (j <= i - window), float("-inf"))
            outs.append(logits.softmax(-1) @ v[:, head])
        x = x + torch.cat(outs, 1) @ w[f"model.layers.{layer}.o_proj.weight"].T
    return (x @ w["lm_head.weight"].T).log_softmax(-1)


def test_likelihoods_are_the_formulas(llm: LLM, checkpoint: Path) -> None:
    """Of a prompt in several chunks and of the answer, within float32's rounding; and pages came back meanwhile."""
    prompt = torch.randint(1, 257, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    (out,) = generate(llm, [prompt], greedy(40, prompt_logprobs=1, logprobs=1))
    answer = list(out.outputs[0].token_ids)
    want = formula(checkpoint, torch.tensor(prompt + answer))
    at = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
    for position, (found, token) in enumerate(zip(at, (prompt + answer)[1:], strict=True)):
        # float32's roundoff on numbers of at most some hundred, through two layers.
        assert found[token].logprob == pytest.approx(want[position, token].item(), abs=1e-3)
    pool = manager(llm).pool
    assert pool.released_total > 0
    assert_all_free(llm)


def test_a_request_holds_its_windows_and_no_more(llm: LLM) -> None:
    """After the prompt: the pages that the next query of each head reads, in both layers."""
    prompt = torch.randint(1, 257, (LENGTH,), generator=torch.Generator().manual_seed(2)).tolist()
    add(llm, "one", prompt, 8)
    run_until_decoding(llm)
    pool = manager(llm).pool
    (slot,) = manager(llm)._slot_of.values()
    needed = [(LENGTH - 1) // PAGE + 1 - (LENGTH + 1 - window) // PAGE for window in WINDOWS]
    assert len(pool.held_ids(slot, 0)) == 2 * sum(needed)
    run_to_the_end(llm)
    assert_all_free(llm)
