"""LoRA adapters on a CUDA GPU, with vLLM's default flags: compiled, asynchronous, with CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engines import GPU_DEFAULTS, engine
from tests.support.adapters import check_adapters
from tests.support.evicting import VARIANTS, make_evicting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("variant", ["qwen3-borrowed", "llama-adapter"])
def test_adapters_in_one_batch(tmp_path: Path, variant: str) -> None:
    """Both slots are taken, and the batch has a request without an adapter."""
    made = make_evicting(tmp_path, VARIANTS[variant])
    lora: dict[str, Any] = {"dtype": "float16", "enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    graphs = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
    with engine(made.served, max_model_len=2048, compilation_config=graphs, **lora, **GPU_DEFAULTS) as llm:
        apart = check_adapters(llm, made, tmp_path)
    # vLLM's kernels for adapters take no float32. In float16 some decisions fall on their threshold's other side.
    print(apart)
    assert (5 * apart.diagonal() < (apart + 100 * torch.eye(3)).amin(1)).all()
