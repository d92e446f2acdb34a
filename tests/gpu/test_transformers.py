"""transformers' ways of handing texts over, on a GPU, where the same arguments reach the Triton kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families.test_transformers_arguments import PACKINGS, TEXTS, alone, padded
from tests.support.checkpoints import make_checkpoint, make_sparse_gpt2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module", params=["fox", "sparse_gpt2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, float]:
    """A model in float64 on the CPU; the same in float32 on the GPU; and how far their logits may be apart.

    That is ten times as far as float32 on the CPU is from float64: the GPU rounds as often, in another order.
    """
    if request.param == "fox":
        fields: dict[str, Any] = {"use_k_shift": True, "use_v_shift": True, "qk_norm": True}
        folder = make_checkpoint(tmp_path_factory.mktemp("fox"), "official", hidden_size=64, num_heads=2, **fields)
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    else:
        exact = make_sparse_gpt2().double().eval()
    rounded = copy.deepcopy(exact).float()
    apart = max((alone(rounded, one) - alone(exact, one)).abs().max().item() for one in TEXTS)
    return exact, rounded.cuda(), 10 * apart


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_packed_texts_are_as_alone(models: tuple[Any, Any, float], packing: str) -> None:
    exact, model, apart = models
    with torch.no_grad():
        found = model(torch.cat(TEXTS)[None].cuda(), **on_gpu(PACKINGS[packing]())).logits[0]
    want = torch.cat([alone(exact, one) for one in TEXTS])
    torch.testing.assert_close(found.double().cpu(), want, rtol=0, atol=apart)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_texts_are_as_alone(models: tuple[Any, Any, float], side: str) -> None:
    exact, model, apart = models
    ids, mask = padded(side)
    with torch.no_grad():
        found = model(ids.cuda(), attention_mask=mask.cuda()).logits.double().cpu()
    for row, real, one in zip(found, mask.bool(), TEXTS, strict=True):
        torch.testing.assert_close(row[real], alone(exact, one), rtol=0, atol=apart)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_answer_as_alone(models: tuple[Any, Any, float], side: str, options: dict[str, Any]) -> None:
    exact, model, _ = models
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    ids, mask = padded(side)
    together = model.generate(ids.cuda(), attention_mask=mask.cuda(), **options).cpu()
    for prompt, row in zip(TEXTS, together, strict=True):
        assert torch.equal(row[ids.shape[1] :], exact.generate(prompt[None], **options)[0, len(prompt) :])
