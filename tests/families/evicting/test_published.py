"""Small checkpoints with outputs of the official code of DMS and KVzap, where they lie beside this checkout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from benchmarks.engines import engine, generate, greedy
from tests.support import ROOT
from vllm_fox.families.evicting.attention import EvictingFormula
from vllm_fox.families.evicting.convert import convert

FIXTURES = ROOT.parent / "shared" / "fixtures"
NAMES = sorted(path.name.removesuffix("-expected.json") for path in FIXTURES.glob("*-expected.json"))


@dataclass
class Published:
    """A checkpoint of others, what it must answer, and where it is served from."""

    expected: dict[str, Any]
    reference: dict[str, torch.Tensor]
    served: Path


@pytest.fixture(scope="module", params=NAMES or ["none"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    if not NAMES:
        pytest.skip("no published checkpoints with outputs beside this checkout")
    name, served = request.param, tmp_path_factory.mktemp("served") / "model"
    expected = json.loads((FIXTURES / f"{name}-expected.json").read_text())
    predictor = FIXTURES / f"{name}-predictor"
    options: dict[str, Any] = {}
    if predictor.exists():
        options = {"predictor": predictor, "threshold": expected["threshold"], "window": expected["window"]}
    list(convert(FIXTURES / name, served, **options))
    return Published(expected, load_file(FIXTURES / f"{name}-reference.safetensors"), served)


@pytest.fixture(scope="module", params=[2048, 97], ids=["whole", "chunks"])
def llm(published: Published, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """An engine that reads the prompt at once, or in pieces."""
    options = {"skip_tokenizer_init": True, "max_logprobs": -1, "num_gpu_blocks_override": 200}
    with engine(published.served, max_model_len=1024, max_num_batched_tokens=request.param, **options) as llm:
        yield llm


def test_likelihoods_and_evictions(llm: LLM, published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of all tokens, and which are evicted."""
    decided: dict[int, list[torch.Tensor]] = {}
    forward = EvictingFormula.forward

    def recorded(self: EvictingFormula, inputs: Any, *args: Any) -> None:
        decided.setdefault(self.layer, []).append(inputs[3].clone())
        forward(self, inputs, *args)

    monkeypatch.setattr(EvictingFormula, "forward", recorded)
    ids = published.reference["input_ids"].tolist()
    (out,) = generate(llm, [ids], greedy(1, prompt_logprobs=-1, detokenize=False))
    vocab = published.reference["logits"].shape[1]
    found = torch.tensor([[at[token].logprob for token in range(vocab)] for at in out.prompt_logprobs[1:]])
    want = published.reference["logits"].log_softmax(-1)[:-1]
    # What float32 leaves of logits up to some ten in 4 layers; two of the official code's own ways differ as much.
    assert (found - want).abs().max() < 1e-4
    nll = -found.gather(1, torch.tensor(ids[1:])[:, None]).mean()
    assert nll.item() == pytest.approx(published.expected["mean_nll"], abs=1e-5)
    per_layer = torch.stack([torch.cat(parts)[: len(ids)].T for _, parts in sorted(decided.items())])
    if "score" not in published.reference:  # DMS: a token decides about the one before it
        per_layer = torch.cat([per_layer[..., 1:], torch.zeros_like(per_layer[..., :1])], -1)
    assert torch.equal(per_layer, published.reference["evicted"].bool())


def test_greedy_answer(llm: LLM, published: Published) -> None:
    length = published.expected["greedy"]["prompt_len"]
    prompt = published.reference["input_ids"][:length].tolist()
    (out,) = generate(llm, [prompt], greedy(64, logprobs=0, detokenize=False))
    assert list(out.outputs[0].token_ids) == published.reference["greedy_ids"].tolist()
    found = [at[token].logprob for at, token in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)]
    torch.testing.assert_close(torch.tensor(found), published.reference["greedy_logprobs"], atol=1e-4, rtol=0)
