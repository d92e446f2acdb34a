"""The shipped checkpoint that evicts, trained and not random, in a real engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)
from benchmarks.engines import engine, generate, greedy, manager, source_tokens
from tests.support import ROOT
from tests.support.engines import assert_all_free

MODEL = ROOT / "examples" / "llama-evict-tiny"
TOKENS = 2000


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with engine(MODEL, {"page_size": 16}, max_model_len=4096, max_num_batched_tokens=512) as started:
        yield started


def test_likelihoods_are_those_of_transformers(llm: LLM) -> None:
    """Of a text in chunks, and a request holds little more than the tokens that its heads keep."""
    tokens = source_tokens(llm, TOKENS, seed=1)
    pool = manager(llm).pool
    allocated, released = pool.allocated_total, pool.released_total
    (out,) = generate(llm, [tokens], greedy(8, prompt_logprobs=0))
    found = [at[token].logprob for at, token in zip(out.prompt_logprobs[1:], tokens[1:], strict=True)]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
        gone = model.evicted(ids)
    want = logits.gather(1, ids[0, 1:, None])[:, 0]
    assert (torch.tensor(found) - want).abs().mean() < 1e-4
    given_back = (pool.released_total - released) / (pool.allocated_total - allocated)
    assert abs(given_back - gone.float().mean().item()) < 0.15
    assert_all_free(llm)


def test_heads_have_learned_different_things(llm: LLM) -> None:
    """Some let nearly all go and others keep most, which random weights would not."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    evicted = model.evicted(torch.tensor([source_tokens(llm, TOKENS, seed=2)])).float().mean((1, 3))
    assert evicted.max() > 0.95 and evicted.min() < 0.5
