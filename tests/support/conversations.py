"""Conversations at random, on a real engine: turns, resent prompts, shared beginnings, aborts and preemptions."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.engines import generate, num_blocks, scheduler, step


@dataclass
class Answer:
    """What one request came to.

    Attributes:
        prompt, tokens: token ids.
        logprobs: of the answer's tokens.
        cached: tokens of the prompt that were in the cache.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0


@dataclass
class Traffic:
    """What a random traffic came to: answers of all that finished, and how many were aborted or preempted."""

    answers: list[Answer]
    aborted: int
    preempted: int

    @property
    def hits(self) -> int:
        """Answers whose prompt began with cached pages."""
        return sum(one.cached > 0 for one in self.answers)

    def __str__(self) -> str:
        return (
            f"{len(self.answers)} answers, {self.hits} with hits; {self.aborted} requests aborted, preempted "
            f"{self.preempted} times"
        )


def params(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, **options)


def answer_of(out: Any) -> Answer:
    tokens = list(out.outputs[0].token_ids)
    logprobs = [at[token].logprob for at, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
    return Answer(list(out.prompt_token_ids), tokens, logprobs, out.num_cached_tokens)


def random_conversations(
    llm: LLM, requests: int, order: random.Random, *, room: int, longest: int, vocabulary: int
) -> Traffic:
    """Run ``requests`` greedy requests that arrive at random.

    Args:
        room: blocks that they have; the rest is held aside.
        longest: most tokens of a prompt; a conversation that would be longer begins anew.
        vocabulary: tokens are drawn from 1 to this number.
    """

    def words(count: int) -> list[int]:
        return [order.randint(1, vocabulary) for _ in range(count)]

    systems = [words(order.randint(20, longest // 3)) for _ in range(3)]
    texts: list[list[int]] = []
    answers: list[Answer] = []
    asked = aborted = 0
    preempted: dict[str, int] = {}
    sched = scheduler(llm)
    blocks = sched.kv_cache_manager.block_pool
    aside = blocks.get_new_blocks(num_blocks(llm) - room)
    running: set[str] = set()
    while asked < requests or llm.llm_engine.has_unfinished_requests():
        for _ in range(order.randint(0, 2)):
            if asked < requests and len(running) < 12:
                kind = order.random()
                if kind < 0.5 and texts:  # the next turn of a conversation, or the same again
                    prompt = order.choice(texts[-8:]) + words(order.choice([0, 1, 30, 80]))
                else:
                    prompt = order.choice(systems) + words(order.randint(1, 60))
                if len(prompt) > longest:
                    prompt = order.choice(systems) + words(7)
                name = f"chat-{asked}"
                llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params(order.choice([1, 2, 15, 40])))
                running.add(name)
                asked += 1
        for out in step(llm):
            if out.finished:
                running.discard(out.request_id)
                answers.append(answer_of(out))
                texts.append(answers[-1].prompt + answers[-1].tokens)
        for request in sched.requests.values():
            preempted[request.request_id] = request.num_preemptions
        if sched.running and order.random() < 0.03:
            sched._preempt_request(sched.running.pop(), 0.0)
        if running and order.random() < 0.03:
            name = order.choice(sorted(running))
            running.discard(name)
            aborted += 1
            llm.llm_engine.abort_request([name])
    blocks.free_blocks(aside)
    return Traffic(answers, aborted, sum(preempted.values()))


def assert_equal_without_cache(llm: LLM, answers: list[Answer], tolerance: float) -> float:
    """Ask everything once more without reading the cache: the same tokens, and likelihoods within ``tolerance``.

    Returns:
        How far the log-probabilities are apart at most.
    """
    farthest = 0.0
    options = [params(len(one.tokens), skip_reading_prefix_cache=True) for one in answers]
    for one, out in zip(answers, generate(llm, [one.prompt for one in answers], options), strict=True):
        again = answer_of(out)
        assert again.cached == 0
        assert again.tokens == one.tokens, (one.prompt, one.cached)
        apart = max(abs(a - b) for a, b in zip(again.logprobs, one.logprobs, strict=True))
        assert apart <= tolerance, (apart, one.cached)
        farthest = max(farthest, apart)
    return farthest
