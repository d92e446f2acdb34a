"""Speculative decoding by n-gram on the shipped checkpoint: rejected drafts change nothing and leave nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

from benchmarks.engines import engine, generate, greedy, manager, run_to_the_end, source_tokens
from tests.support.conversations import assert_equal_without_cache, random_conversations
from tests.support.engines import assert_all_free
from tests.support.speculation import SPECULATION, drafted

PAGE = 16
# More by hand: FOX_RANDOM_REQUESTS=500 pytest tests/engine/test_speculation.py -k random
RANDOM_REQUESTS = int(os.environ.get("FOX_RANDOM_REQUESTS", "60"))
# Logits of up to 100 are rounded by 6e-6 in float32, and steps that begin elsewhere add up in another order.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def llm(fox_tiny: Path) -> Iterator[LLM]:
    with engine(
        fox_tiny,
        {"page_size": PAGE},
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        num_gpu_blocks_override=100,
        speculative_config=SPECULATION,
    ) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    assert llm.reset_prefix_cache()
    yield
    run_to_the_end(llm)
    assert_all_free(llm)


def test_greedy_text_is_that_of_transformers(llm: LLM, fox_tiny: Path) -> None:
    """Of a text that repeats itself, of which drafts are accepted, and of others, of which they are rejected."""
    import vllm_fox.hf  # noqa: F401 (makes AutoModelForCausalLM know the model)

    before, released = drafted(llm), manager(llm).pool.released_total
    prompts = [source_tokens(llm, 150, seed) for seed in range(3)]
    prompts[0] += prompts[0][:60]
    outs = generate(llm, prompts, greedy(100))
    proposed, accepted = (now - then for now, then in zip(drafted(llm), before))
    assert 50 < accepted < proposed - 50, (proposed, accepted)
    assert manager(llm).pool.released_total > released
    model = AutoModelForCausalLM.from_pretrained(fox_tiny, dtype=torch.float32).eval()
    for prompt, out in zip(prompts, outs, strict=True):
        ids = torch.tensor([prompt])
        text = model.generate(ids, max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert text[0, len(prompt) :].tolist() == list(out.outputs[0].token_ids)


def test_random_conversations_hit_pages_of_certain_tokens(llm: LLM) -> None:
    """Turns, resent prompts, aborts and preemptions: what is cached is what requests without drafts would leave."""
    before = drafted(llm)
    traffic = random_conversations(llm, RANDOM_REQUESTS, random.Random(3), room=99, longest=400, vocabulary=250)
    proposed, accepted = (now - then for now, then in zip(drafted(llm), before))
    print(f"{traffic}; {accepted} of {proposed} drafts accepted")
    assert traffic.hits > len(traffic.answers) // 4 and 50 < accepted < proposed - 50
    assert_all_free(llm)
    assert_equal_without_cache(llm, traffic.answers, TOLERANCE)
