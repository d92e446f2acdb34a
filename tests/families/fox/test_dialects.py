"""Every variant of both checkpoint dialects through the real engine, against the formulas in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.config import CompilationMode

from benchmarks.engines import engine, generate, greedy, manager
from tests.support.checkpoints import VARIANTS, VOCAB_SIZE, make_checkpoint
from tests.support.engines import assert_all_free
from tests.support.reference_model import reference_logits

PAGE, LENGTHS, ANSWER = 16, (240, 75), 8
SMALL: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_seqs": 4,
    # A prompt of 240 tokens takes four chunks, cut at other places than pages and requests.
    "max_num_batched_tokens": 70,
    "num_gpu_blocks_override": 80,
}

# 6 deviations of sqrt(10 roundings * 4 layers / 3) u of logits of 20. Where embeddings are tied some are larger.
LOGPROB_ERROR = 3e-5

# Nothing can die: no gate at all, or all heads share one KV head and one of them never forgets.
NEVER = {"no_gate", "fla_gqa_gate"}
Served = list[tuple[list[int], list[int], list[dict[int, float]]]]


def prompts() -> list[list[int]]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=rng).tolist() for length in LENGTHS]


def serve(llm: LLM) -> Served:
    """Of each prompt: its tokens, the answer, and the logprobs that the engine gave for every position but 0."""
    outs = generate(llm, prompts(), greedy(ANSWER, prompt_logprobs=4, logprobs=4))
    served: Served = []
    for prompt, out in zip(prompts(), outs, strict=True):
        answer = list(out.outputs[0].token_ids)
        given = [*out.prompt_logprobs[1:], *out.outputs[0].logprobs]
        assert len(given) == len(prompt) - 1 + ANSWER
        served.append((prompt, answer, [{token: p.logprob for token, p in at.items()} for at in given]))
    return served


def largest_error(folder: Path, served: Served) -> tuple[float, float]:
    """Of the logprobs that the engine gave, at every position; and what is allowed."""
    found, largest = [], 20.0
    for prompt, answer, given in served:
        logits = reference_logits(folder, prompt + answer)
        expected, largest = logits.log_softmax(-1), max(largest, float(logits.abs().max()))
        found += [abs(p - float(expected[t, token])) for t, at in enumerate(given) for token, p in at.items()]
    return max(found), LOGPROB_ERROR * largest / 20


def assert_greedy(folder: Path, served: Served) -> None:
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
    worst, allowed = largest_error(folder, served)
    print(f"{name}: largest error {worst:.1e}, allowed {allowed:.1e}, {released} pages released")
    assert worst < allowed
    assert_greedy(folder, served)
    assert (released == 0) == (name in NEVER)


@pytest.mark.parametrize("dtype, most", [("bfloat16", 0.02), ("float16", 0.005)])
def test_likelihood_in_short_dtypes(dtype: str, most: float, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, **VARIANTS["pro_rope"])
    with engine(folder, {"page_size": PAGE}, dtype=dtype, **SMALL) as llm:
        served = serve(llm)
        assert manager(llm).pool.released_total > 0
        assert_all_free(llm)
    for prompt, _, given in served:
        logits = reference_logits(folder, prompt)
        expected = logits.log_softmax(-1)
        errors = [given[t][token] - float(expected[t, token]) for t, token in enumerate(prompt[1:])]
        mean, rms = sum(errors) / len(errors), math.sqrt(sum(error**2 for error in errors) / len(errors))
        allowed = math.sqrt(20 / 3) * torch.finfo(getattr(torch, dtype)).eps / 2 * float(logits.std())
        print(f"{dtype}: mean NLL is off by {-mean:.1e}, tokens by {rms:.1e}, allowed {allowed:.1e}")
        # Root of two layers' ten roundings each, by u / sqrt(3), of logits that are about their deviation large.
        assert rms <= allowed
        # And errors of tokens are as often above as below.
        assert abs(mean) < most and abs(mean) <= 4 * rms / math.sqrt(len(errors))


def test_compiled(tmp_path: Path) -> None:
    """Without --enforce-eager, as users start it: the model is compiled around the attention operator."""
    folder = make_checkpoint(tmp_path, **VARIANTS["pro_rope"])
    with engine(folder, {"page_size": PAGE}, enforce_eager=False, **SMALL) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE
        served = serve(llm)
        assert manager(llm).pool.released_total > 0
        assert_all_free(llm)
    worst, allowed = largest_error(folder, served)
    assert worst < allowed
    assert_greedy(folder, served)
