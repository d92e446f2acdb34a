"""Models of another size than the trained one."""

from __future__ import annotations

import torch

from benchmarks.training import of_other_size
from tests.support import ROOT
from vllm_fox.hf.fox.modeling import ForgettingTransformerForCausalLM


def test_a_wider_model_has_a_wider_mlp() -> None:
    """A saved config says how wide its MLP is, which is not to stay."""
    small = ForgettingTransformerForCausalLM.from_pretrained(ROOT / "examples" / "fox-tiny").config
    config = of_other_size(small, 24, 2048, 32)
    assert config.intermediate_size == 4864  # two thirds of 3.5 times 2,048, as a multiple of 256
    with torch.device("meta"):
        model = ForgettingTransformerForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 1_233_898_240
