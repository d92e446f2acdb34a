"""Every variant of both checkpoint dialects through the real engine, against the formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.checkpoints import FIXED_GATE, VARIANTS, VOCAB_SIZE, make_checkpoint
from tests.engines import assert_all_free, engine, generate, greedy, manager
from tests.reference_model import reference_logits

PAGE, LENGTHS, ANSWER = 16, (240, 75), 8
SMALL: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    # A prompt of 240 tokens takes four chunks, cut at other places than pages and requests.
    "max_num_batched_tokens": 70,
    "num_gpu_blocks_override": 80,
}

# Nothing can die: no gate at all, or all heads share one KV head and one of them never forgets.
NEVER = {"no_gate", "fla_gqa_gate"}
# Forgets, but with fixed gates the fastest head needs longer than 240 tokens to reach the threshold.
TOO_SLOW: set[str] = set()


def prompts() -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=rng).tolist() for length in LENGTHS]


def serve(llm: LLM) -> list[tuple[list[int], list[int], list[dict[int, float]]]]:
    """Of each prompt: its tokens, the answer, and for positions 1.. the logprobs that the engine gave."""
    outs = generate(llm, prompts(), greedy(ANSWER, prompt_logprobs=4, logprobs=4))
    served = []
    for prompt, out in zip(prompts(), outs, strict=True):
        answer = list(out.outputs[0].token_ids)
        given = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
        assert len(given) == len(prompt) - 1 + ANSWER
        served.append((prompt, answer, [{token: p.logprob for token, p in at.items()} for at in given]))
    return served


def differences(folder: Path, served: list[tuple[list[int], list[int], list[dict[int, float]]]]) -> list[float]:
    """Served minus true logprob, of every token of which the engine gave one, at every position."""
    found = []
    for prompt, answer, given in served:
        expected = reference_logits(folder, prompt + answer).log_softmax(-1)
        found += [p - float(expected[t, token]) for t, at in enumerate(given) for token, p in at.items()]
    return found


def assert_greedy(folder: Path, served: list[tuple[list[int], list[int], list[dict[int, float]]]]) -> None:
    for prompt, answer, _ in served:
        logits = reference_logits(folder, prompt + answer)
        assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logprobs_and_greedy_tokens_are_the_reference_ones(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, **VARIANTS[name])
    with engine(folder, {"page_size": PAGE}, **SMALL) as llm:
        served = serve(llm)
        released = manager(llm).pool.released_total
        assert_all_free(llm)
    worst = max(map(abs, differences(folder, served)))
    print(f"{name}: largest error {worst:.1e}, {released} pages released")
    assert worst < 1e-3
    assert_greedy(folder, served)
    assert (released == 0) == (name in NEVER)
