"""examples/retrofit.py: what it learns, resumed runs, what it exports, and its errors."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)
from benchmarks.engines import engine, generate, greedy
from tests.support import ROOT
from tests.support.training_scripts import Script, log

CONTEXT = 128
OPTIONS = (
    "--cpu", f"--context={CONTEXT}", "--batch=4", "--steps=40", "--warmup=3", "--save-every=10", "--eval-every=20",
    "--eval-windows=16", "--lr=0.003", "--ratio=4", "--window=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has learned nothing, with the tokenizer of the texts."""
    from text_corpus import END, find_texts, train_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer: Tokenizer = train_tokenizer([path.read_text() for path in find_texts(text)], 400)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=384,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script(base: Path) -> Script:
    return Script("retrofit.py", OPTIONS, (str(base),))


@pytest.fixture(scope="module")
def whole(script: Script, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    output = tmp_path_factory.mktemp("retrofit")
    assert "is ready. Serve it with: vllm serve" in script.run_alone(text, output)
    return output


PREDICTOR = ("--predictor=mlp", "--hidden-dim=32", "--steps=30", "--lr=0.005")


@pytest.fixture(scope="module")
def predicted(script: Script, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which predictors learn."""
    output = tmp_path_factory.mktemp("predicted")
    assert "the predictors explain" in script.run(text, output, *PREDICTOR)
    return output


def test_it_learns_to_evict_as_much_as_was_asked(whole: Path) -> None:
    lines = log(whole)
    half, last = lines[19], lines[-1]
    assert last["step"] == 40 and 0.1 < half["evicted_share"] < last["evicted_share"]
    found = json.loads((whole / "figures.json").read_text())
    assert found["evicted_share"] == pytest.approx(3 / 4, abs=0.02)
    assert 0 < found["divergence"] < 0.1 and found["dense_loss"] == last["dense_loss"]


def test_defaults_follow_the_model_and_the_steps(base: Path, text: Path, tmp_path: Path) -> None:
    """The hidden size is 64, for which the learning rate of DMS's authors, 3e-5 for 4,096, is 64 times as large."""
    import retrofit

    words = [
        str(base),
        str(text),
        f"--output={tmp_path}",
        "--cpu",
        f"--context={CONTEXT}",
        "--window=16",
        "--steps=9",
    ]
    args = retrofit.parse(words)
    retrofit.load(args)
    assert args.ramp == 4 and args.lr == pytest.approx(64 * 3e-5, rel=0.03)
    predictors = retrofit.parse([*words, "--predictor=linear"])
    retrofit.load(predictors)
    assert predictors.lr == 5e-3
    given = retrofit.parse([*words, "--lr=0.01", "--ramp=9"])
    retrofit.load(given)
    assert (given.lr, given.ramp) == (0.01, 9)


def test_only_adapters_are_new(whole: Path, base: Path) -> None:
    """The model's other weights are those that it had, and checkpoints of the run hold adapters alone."""
    before, after = load_file(base / "model.safetensors"), load_file(whole / "model" / "model.safetensors")
    new = after.keys() - before.keys()
    assert len(new) == 4 and all("dms_proj_alpha" in name for name in new)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    saved = load_file(next((whole / "checkpoints").glob("step-40")) / "model.safetensors")
    assert all("dms_proj_alpha" in name for name in saved)
    config = json.loads((whole / "model" / "config.json").read_text())
    assert config["eviction"]["window"] == 16 and config["architectures"] == ["EvictingDecoderForCausalLM"]


def test_a_killed_run_goes_on_to_the_same_model(script: Script, text: Path, whole: Path, tmp_path: Path) -> None:
    assert script.stopped_at(text, tmp_path, 15, signal.SIGKILL) == -9
    assert len(log(tmp_path)) == 15
    script.run(text, tmp_path)
    assert log(tmp_path) == log(whole)
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (whole, tmp_path))
    assert first == second


def test_two_processes_or_less_memory_change_nothing(
    script: Script, text: Path, whole: Path, tmp_path: Path
) -> None:
    """Half of each batch each, or activations computed again, with the same noise: the same losses."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *script.command(text, tmp_path)]
    done = subprocess.run([*launch, "--steps=5", "--ramp=5"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "2 processes on cpu" in done.stdout, done.stderr[-3000:]
    one = tmp_path / "one"
    script.run(text, one, "--steps=5", "--ramp=5")
    less = tmp_path / "less"
    script.run(text, less, "--steps=5", "--ramp=5", "--checkpointing")
    for line, expected, checkpointed in zip(log(tmp_path), log(one), log(less), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        # What is computed again is what it was.
        assert checkpointed["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert checkpointed["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-6)


def test_predictors_learn_what_the_unchanged_model_attends_to(predicted: Path, base: Path) -> None:
    found, last = json.loads((predicted / "figures.json").read_text()), log(predicted)[-1]
    assert last["step"] == 30 and last["loss"] < 0.8 * log(predicted)[0]["loss"]
    assert 0.1 < found["r_squared"] < 1 and found["r_squared"] == last["r_squared"]
    assert found["evicted_share"] == pytest.approx(3 / 4, abs=0.02)
    before, after = load_file(base / "model.safetensors"), load_file(predicted / "model" / "model.safetensors")
    assert len(after.keys() - before.keys()) == 8 and all("kvzap" in name for name in after.keys() - before.keys())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    eviction = json.loads((predicted / "model" / "config.json").read_text())["eviction"]
    assert (eviction["method"], eviction["window"], eviction["hidden_dim"]) == ("kvzap", 16, 32)


def test_predictors_of_a_killed_run_are_the_same(
    script: Script, text: Path, predicted: Path, tmp_path: Path
) -> None:
    assert script.stopped_at(text, tmp_path, 15, signal.SIGKILL, *PREDICTOR) == -9
    assert len(log(tmp_path)) == 15
    script.run(text, tmp_path, *PREDICTOR)
    assert log(tmp_path) == log(predicted)
    first, second = ((folder / "model" / "model.safetensors").read_bytes() for folder in (predicted, tmp_path))
    assert first == second


def test_predictors_may_be_linear(script: Script, text: Path, tmp_path: Path) -> None:
    script.run(text, tmp_path, "--predictor=linear", "--steps=2")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert weights["model.layers.0.self_attn.kvzap.weight"].shape == (2, 64)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["eviction"]["hidden_dim"] is None


@pytest.mark.parametrize("kind", ["whole", "predicted"])
def test_its_model_is_served_as_it_is(kind: str, request: pytest.FixtureRequest) -> None:
    """Perplexities of transformers and of the server are equal, and so is the answer."""
    whole: Path = request.getfixturevalue(kind)
    folder = whole / "model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.load(whole / "data" / "held_out.npy")[:200].astype(np.int64)
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
        assert model.evicted(ids).float().mean() > 0.5
    with engine(folder, max_model_len=256, dtype="float32") as llm:
        (out,) = generate(llm, [tokens.tolist()], greedy(1, prompt_logprobs=0))
    given = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:].tolist(), strict=True)]
    assert -sum(given) / len(given) == pytest.approx(expected, abs=1e-4)


def test_errors_name_what_is_wrong(script: Script, text: Path, whole: Path, tmp_path: Path) -> None:
    nowhere = Script("retrofit.py", OPTIONS, (str(tmp_path / "nowhere"),))
    again = Script("retrofit.py", OPTIONS, (str(whole / "model"),))
    cases = [
        (script, ["--context=512"], "has 384 positions"),
        (script, ["--window=128"], "--window is 128: it must be less than --context 128"),
        (script, ["--ratio=1"], "--ratio.*a number above 1"),
        (script, ["--ramp=41"], "--ramp is 41: it must be at most --steps 40"),
        (script, ["--predictor=mlp", "--context=256"], "--context is 256: .* are 5.. tokens, .* has 384 positions"),
        (script, ["--predictor=linear", "--hidden-dim=4"], "--hidden-dim is given: only --predictor mlp has"),
        (script, ["--predictor=linear", "--ramp=4"], "--ramp is given: it is for adapters"),
        (nowhere, [], "nowhere is no folder: download the checkpoint"),
        (again, [], "model_type is 'evicting_decoder': it must be one of llama, mistral, qwen2, qwen3"),
    ]
    runs = [one.arguments(text, tmp_path / str(n), *more) for n, (one, more, _) in enumerate(cases)]
    for found, (_, _, message) in zip(script.errors(runs), cases, strict=True):
        assert re.search(message, found), (message, found)
