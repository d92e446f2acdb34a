"""LoRA adapters on Forgetting Transformers: answers are those of the merged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.engines import engine
from tests.support.adapters import PROMPT, check_fox_adapters
from tests.support.checkpoints import VARIANTS, make_checkpoint
from tests.support.new_weights import found
from tests.support.quantised import fox_likelihood, rms
from vllm_fox import config_hook


def test_adapters_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every projection, with gates and shifts beside them.

    On a CPU this is refused, since vLLM gives requests without an adapter the last one. Here that one is empty.
    """
    model = make_checkpoint(tmp_path / "model", **VARIANTS["pro"])
    others = make_checkpoint(tmp_path / "others", **VARIANTS["pro"], seed=1)
    monkeypatch.setattr(config_hook, "adapters", lambda *_: ())
    lora = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    with engine(model, {"page_size": 16}, max_model_len=512, max_num_batched_tokens=160, **lora) as llm:
        apart = check_fox_adapters(llm, model, tmp_path)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(others)})
        assert llm.reset_prefix_cache()
        new = rms(found(llm, PROMPT) - fox_likelihood(others, PROMPT, None))
    # float32's roundoff on logits of at most some ten, through two layers.
    assert apart.diagonal().max() < 1e-4 and (apart + torch.eye(3)).min() > 0.1, apart
    # Weights that come later go where vLLM's layers for adapters have put the first ones.
    assert new < 1e-4
