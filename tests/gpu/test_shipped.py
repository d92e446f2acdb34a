"""The shipped checkpoint on a CUDA GPU with default flags; alone in its module, as an engine is in its process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from benchmarks.engines import GPU_DEFAULTS, engine, generate, manager, source_tokens
from tests.support.engines import assert_all_free

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_shipped_checkpoint_answers(fox_tiny: Path) -> None:
    with engine(fox_tiny, dtype="auto", max_model_len=4096, **GPU_DEFAULTS) as llm:
        prompts = [source_tokens(llm, 2048, seed=seed) for seed in range(3)]
        for out in generate(llm, prompts, SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)):
            print("-----", out.outputs[0].text, sep="\n")
            assert len(out.outputs[0].token_ids) == 96
        assert manager(llm).pool.released_total > 0
        assert_all_free(llm)
