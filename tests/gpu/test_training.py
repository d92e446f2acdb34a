"""Gradients of training on a GPU: a trained model on long real text, in bfloat16 against float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.gradients import assert_near_float32, real_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
PACKED = (0, 5000, 5001, 21000, 65536)


@pytest.mark.parametrize(
    "options",
    [{}, {"compiled": True}, {"weights": torch.bfloat16}, {"cu_seqlens": torch.tensor(PACKED, dtype=torch.int32)}],
    ids=["autocast", "compiled", "bfloat16 weights", "packed"],
)
def test_gradients_of_a_trained_model_in_bfloat16(fox_tiny: Path, options: dict[str, Any]) -> None:
    """Windows of 16,384 tokens, or as many packed into one row."""
    ids = real_tokens(fox_tiny, 65536).cuda()
    assert_near_float32(fox_tiny, ids[None] if "cu_seqlens" in options else ids.view(4, -1), **options)
