"""examples/train_llama.py: what it exports, and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.support.training_scripts import Script, log

LLAMA = Script(
    "train_llama.py",
    (
        "--cpu", "--layers=2", "--hidden=64", "--heads=4", "--kv-heads=2", "--vocab=400", "--context=64",
        "--batch=4", "--micro-batch=2", "--steps=8", "--warmup=2", "--eval-every=8", "--eval-windows=2",
        "--lr=0.01",
    ),
)  # fmt: skip


def test_the_export_is_a_llama_with_the_loss_that_was_logged(text: Path, tmp_path: Path) -> None:
    assert "is ready: vllm serve" in LLAMA.run(text, tmp_path)
    lines = log(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    assert (model.config.num_key_value_heads, model.config.intermediate_size) == (2, 192)
    held_out = np.load(tmp_path / "data" / "held_out.npy")
    there = len(held_out) // 64
    windows = [held_out[n * there // 2 * 64 :][:64] for n in range(2)]
    losses = [
        model(input_ids=ids, labels=ids).loss.item()
        for ids in (torch.from_numpy(window.astype(np.int64))[None] for window in windows)
    ]
    # The export rounds weights of up to 1 to bfloat16's 8 bits.
    assert np.mean(losses) == pytest.approx(lines[-1]["validation_loss"], abs=0.02)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("def f(x):").input_ids) == "def f(x):"


def test_sizes_that_make_no_model_are_named(text: Path, tmp_path: Path) -> None:
    cases = {
        "--hidden=66": "--hidden is 66: it must be an even multiple of --heads 4.",
        "--kv-heads=3": "--heads is 4: it must be a multiple of --kv-heads 3.",
    }
    found = LLAMA.errors([LLAMA.arguments(text, tmp_path, option) for option in cases])
    for error, expected in zip(found, cases.values(), strict=True):
        assert expected in error
