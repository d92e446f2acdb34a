"""Speculative decoding by n-gram with learned eviction: rejected drafts evict nothing, and decide about nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)
from benchmarks.engines import engine, manager, source_tokens
from tests.support import ROOT
from tests.support.engines import assert_all_free, random_traffic
from tests.support.speculation import SPECULATION, drafted

MODEL = ROOT / "examples" / "llama-evict-tiny"
OPTIONS = {"max_model_len": 1024, "max_num_batched_tokens": 160, "max_num_seqs": 6, "num_gpu_blocks_override": 80}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """In this model a token decides about the one before it."""
    with engine(MODEL, {"page_size": 16}, speculative_config=SPECULATION, **OPTIONS) as started:
        yield started


def test_random_requests_have_the_text_of_transformers(llm: LLM) -> None:
    """Each token of all that finish is the likeliest, with aborts, preemptions and scarce memory."""
    order = random.Random(0)
    requests = {
        f"r{n}": (source_tokens(llm, order.randint(2, 500), seed=n), order.randint(40, 120)) for n in range(16)
    }
    finished, aborted, preempted = random_traffic(llm, requests, order, room=60)
    assert_all_free(llm)
    proposed, accepted = drafted(llm)
    print(f"{len(finished)} answers, {len(aborted)} aborted, preempted {preempted} times; {accepted} of {proposed}")
    assert 50 < accepted < proposed - 50, (proposed, accepted)
    assert manager(llm).pool.released_total > 0 and len(finished) > 8
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for name, answer in finished.items():
        prompt = requests[name][0]
        with torch.no_grad():
            rows = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
        # float32's roundoff on logits of at most some ten, through four layers.
        assert (rows.amax(1) - found).max() < 2e-4, name
