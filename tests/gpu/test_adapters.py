"""LoRA adapters on a CUDA GPU, with vLLM's default flags: compiled, asynchronous, with CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engines import GPU_DEFAULTS, engine
from tests.support.adapters import check_adapters, check_fox_adapters
from tests.support.checkpoints import VARIANTS as FOX_VARIANTS
from tests.support.checkpoints import make_checkpoint
from tests.support.evicting import VARIANTS, make_evicting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


# Both slots are taken, and the batch has a request without an adapter.
OPTIONS: dict[str, Any] = {
    "dtype": "float16",
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "max_model_len": 2048,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]},
    **GPU_DEFAULTS,
}


@pytest.mark.parametrize("variant", ["qwen3-borrowed", "llama-adapter"])
def test_adapters_in_one_batch(tmp_path: Path, variant: str) -> None:
    made = make_evicting(tmp_path, VARIANTS[variant])
    with engine(made.served, **OPTIONS) as llm:
        apart = check_adapters(llm, made, tmp_path)
    # vLLM's kernels for adapters take no float32. In float16 some decisions fall on their threshold's other side.
    print(apart)
    assert (5 * apart.diagonal() < (apart + 100 * torch.eye(3)).amin(1)).all()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("quantization", [None, "fp8"])
@pytest.mark.parametrize("variant", ["pro", "fla_gqa_bias_qk_norm"])
def test_forgetting_transformers(tmp_path: Path, variant: str, quantization: str | None, ranks: int) -> None:
    """Of both dialects, on quantised weights as well, and with heads shared out to two GPUs."""
    if torch.cuda.device_count() < ranks:
        pytest.skip("needs two CUDA GPUs")
    model = make_checkpoint(tmp_path / "model", **FOX_VARIANTS[variant])
    layout = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp" if ranks > 1 else None}
    with engine(model, {"page_size": 16}, quantization=quantization, **OPTIONS, **layout) as llm:
        apart = check_fox_adapters(llm, model, tmp_path)
    print(apart)
    assert (5 * apart.diagonal() < (apart + 100 * torch.eye(3)).amin(1)).all()
