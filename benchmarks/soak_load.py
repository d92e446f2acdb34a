"""The load of ``benchmarks.soak``: which requests come when, how each is sent, and how answers are compared."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai

MIX = {
    "greedy": 0.40,
    "sampled": 0.10,
    "chat": 0.15,
    "aborted": 0.10,
    "disconnected": 0.05,
    "several": 0.08,
    "beam": 0.05,
    "structured": 0.07,
}
"""Kinds of requests, and the share of each."""
BOUND = 1e-3
"""Nats by which rounding may change a token's log-likelihood. In float32 a batch changes only the order of sums."""
TOP = 5
"""Alternatives of each token that are asked for, so that the token of another answer is mostly among them."""
TURNS, USER_TOKENS = 3, 32
"""A chat: its turns, and the tokens that a user adds in each."""
SYSTEMS = 4
"""System texts that chats share."""
CHOICES = ("yes", "no", "maybe")
REGEX = r"[0-9]{4}-[0-9]{2}"
ANSWER = 64
"""Most tokens of an answer."""
BURST, BURST_EVERY, BURST_PROMPT = 48, 180.0, 32
"""Requests that come at once, seconds between such times, and the most tokens of their prompts.

They write much more than they read, so that all of them are admitted and then need more memory than there is: some
are preempted.
"""


@dataclass(frozen=True)
class Arrival:
    """A request, or a chat of several, before it has a text.

    Attributes:
        at: seconds from the start.
        prompt: tokens of the prompt, or of a chat's system text.
        seed: of everything else about it.
    """

    at: float
    kind: str
    prompt: int
    answer: int
    seed: int


def arrivals(seed: int, rate: float, seconds: float, context: int) -> Iterator[Arrival]:
    """A Poisson process, and a burst now and then, the first after half of the time between two.

    Lengths of prompts are log-uniform: from one token to what the context leaves.
    """
    rng, at, burst = random.Random(seed), 0.0, BURST_EVERY / 2
    while (at := at + rng.expovariate(rate)) < seconds:
        if at >= burst:
            for _ in range(BURST):
                yield Arrival(burst, "burst", rng.randint(1, BURST_PROMPT), context // 16, rng.randrange(2**32))
            burst += BURST_EVERY
        kind = rng.choices(list(MIX), list(MIX.values()))[0]
        answer = min(8 if kind == "beam" else rng.randint(1, ANSWER), context // 4)
        longest = context - answer
        prompt = round(math.exp(rng.uniform(0, math.log(longest))))
        if kind == "aborted":
            answer = min(ANSWER, context // 4)  # long enough to be cut off
            prompt = min(prompt, context - answer)
        elif kind == "disconnected":
            prompt = rng.randint(context // 2, longest)  # long enough for the first token to be late
        elif kind == "chat":
            answer = min(answer, context // 16)
            prompt = min(context // 2, max(prompt, context // 8))
        elif kind == "structured":
            answer = min(ANSWER, context // 4)
            prompt = min(prompt, context - answer)
        yield Arrival(at, kind, prompt, answer, rng.randrange(2**32))


@dataclass
class Answer:
    """A greedy answer: what was asked for, and for each token its id, its log-likelihood and alternatives'."""

    prompt: list[int]
    most: int
    tokens: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    others: list[dict[int, float]] = field(default_factory=list)
    go_on: bool = False


def difference(loaded: Answer, alone: Answer) -> tuple[bool, float]:
    """Whether two answers to one prompt have the same tokens, and by how much their likelihoods differ.

    Up to the first token that differs, the same token's log-likelihoods are compared. At that token each server
    state has preferred its own, so both tokens are compared in both states: a tie that rounding decides is a small
    difference. It is infinite if one of the tokens is not among the other's alternatives, or if one answer ends
    where the other goes on.
    """
    worst = 0.0
    for index, (ours, theirs) in enumerate(zip(loaded.tokens, alone.tokens, strict=False)):
        for token in {ours, theirs}:
            before, after = (one.others[index].get(token, -math.inf) for one in (loaded, alone))
            worst = max(worst, abs(before - after) if math.isfinite(before) and math.isfinite(after) else math.inf)
        if ours != theirs:
            return False, worst
    same = len(loaded.tokens) == len(alone.tokens)
    return same, worst if same else math.inf


class Reservoir:
    """A fixed number of answers, of which each ever added is as likely to be there as any other."""

    def __init__(self, size: int, seed: int) -> None:
        self.kept: list[Answer] = []
        self.seen = 0
        self._size, self._rng = size, random.Random(seed)

    def add(self, answer: Answer) -> None:
        self.seen += 1
        if len(self.kept) < self._size:
            self.kept.append(answer)
        elif (place := self._rng.randrange(self.seen)) < self._size:
            self.kept[place] = answer


@dataclass
class Outcome:
    """What became of a request. Times are seconds from the start of the load.

    Attributes:
        first: when its first token came; None if none was waited for or sent by itself.
        cut: whether the client cut it off as was intended.
        error: the kind of error; None if there was none.
        wrong: what is wrong with the answer; None if nothing is.
    """

    kind: str
    begin: float
    end: float = 0.0
    first: float | None = None
    cut: bool = False
    error: str | None = None
    wrong: str | None = None


def kind_of_error(error: BaseException) -> str:
    """An HTTP status if there is one, or else the error's name, and what it says that caused it."""
    if isinstance(error, openai.APIStatusError):
        return str(error.status_code)
    body = getattr(error, "body", None)
    if isinstance(body, dict) and body.get("code"):
        return str(body["code"])
    name = type(error).__name__
    return name if error.__cause__ is None else f"{name}: {error.__cause__!r}"


class Load:
    """Sends requests to a server and keeps what became of them.

    Args:
        client: of the server.
        model: the name that the server gives its model.
        text: token ids that prompts are cut out of.
        context: longest request.
        most: requests in flight at once; those that come beyond are not sent.
        again: greedy answers that are remembered.

    Attributes:
        tokens: of the prompts that were sent.
        is_over: whether every request has ended.
    """

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        text: Sequence[int],
        context: int,
        most: int,
        again: int,
        seed: int,
    ) -> None:
        self.outcomes: list[Outcome] = []
        self.remembered = Reservoir(again, seed)
        self.tokens = self.not_sent = 0
        self._client, self._model, self._text, self._context, self._most = client, model, text, context, most
        self._start = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self.is_over = False

    @property
    def now(self) -> float:
        return time.monotonic() - self._start

    async def run(self, coming: Iterator[Arrival]) -> None:
        """Send every request when it arrives, and wait for the answers."""
        self._start = time.monotonic()
        for one in coming:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), max(0.0, one.at - self.now))
            if self.was_stopped:
                break
            if len(self._tasks) >= self._most:
                self.not_sent += 1
                continue
            task = asyncio.create_task(self._serve(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.gather(*self._tasks)
        self.is_over = True

    def stop(self) -> None:
        """Send nothing more. The answers that are under way are still waited for."""
        self._stopped.set()

    @property
    def was_stopped(self) -> bool:
        return self._stopped.is_set()

    async def ask(
        self, prompt: list[int], most: int, outcome: Outcome, *, go_on: bool = False, salt: str | None = None
    ) -> Answer:
        """A greedy answer.

        Args:
            go_on: whether the answer has ``most`` tokens whatever they are.
            salt: a text of its own, with which the request finds nothing in the prefix cache.
        """
        answer = Answer(prompt, most, go_on=go_on)
        extra: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": go_on}
        if salt is not None:
            extra["cache_salt"] = salt
        stream = await self._client.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=most,
            temperature=0,
            logprobs=TOP,
            stream=True,
            extra_body=extra,
        )
        finished = False
        async for chunk in stream:
            if outcome.first is None:
                outcome.first = self.now
            for choice in chunk.choices:
                finished = finished or choice.finish_reason is not None
                answer.tokens += getattr(choice, "token_ids", None) or []
                if (scores := choice.logprobs) is not None:
                    answer.scores += [score or 0.0 for score in scores.token_logprobs or []]
                    answer.others += [
                        {int(name.partition(":")[2]): value for name, value in top.items()}
                        for top in scores.top_logprobs or []
                    ]
        if not finished or not len(answer.tokens) == len(answer.others) == len(answer.scores) > 0:
            outcome.wrong = "the answer is not whole"
        return answer

    async def _serve(self, one: Arrival) -> None:
        rng = random.Random(one.seed)
        if one.kind == "chat":
            place = rng.randrange(SYSTEMS) * self._context
            said = [*self._text[place : place + one.prompt]]
            for _ in range(TURNS):
                said += self._cut(rng, min(USER_TOKENS, self._context // 16))
                answer = await self._one(one, said, rng)
                if answer is None or self.was_stopped:
                    return
                said = said + answer.tokens
        else:
            await self._one(one, self._cut(rng, one.prompt), rng)

    def _cut(self, rng: random.Random, tokens: int) -> list[int]:
        place = rng.randrange(len(self._text) - tokens)
        return [*self._text[place : place + tokens]]

    async def _one(self, one: Arrival, prompt: list[int], rng: random.Random) -> Answer | None:
        """One request from its beginning to its end, whatever end that is; a greedy answer if it was whole."""
        outcome = Outcome(one.kind, self.now)
        self.tokens += len(prompt)
        answer = None
        try:
            if one.kind in ("greedy", "chat", "burst"):
                answer = await self.ask([*prompt], one.answer, outcome, go_on=one.kind == "burst")
                if outcome.wrong is None:
                    self.remembered.add(answer)
            elif one.kind == "aborted":
                await self._abort(prompt, one.answer, rng.randint(1, 8), outcome)
            elif one.kind == "disconnected":
                await self._disconnect(prompt, one.answer, rng.uniform(0.005, 0.1), outcome)
            else:
                await self._whole(one, prompt, rng, outcome)
        except Exception as error:  # whatever it is, it is a failure of this request, and the others go on
            outcome.error = kind_of_error(error)
        outcome.end = self.now
        self.outcomes.append(outcome)
        return answer if outcome.error is None and outcome.wrong is None else None

    async def _abort(self, prompt: list[int], most: int, after: int, outcome: Outcome) -> None:
        """Close the stream after some tokens."""
        stream = await self._client.completions.create(
            model=self._model, prompt=prompt, max_tokens=most, stream=True, extra_body={"ignore_eos": True}
        )
        seen = 0
        async with stream:
            async for _ in stream:
                outcome.first = outcome.first or self.now
                seen += 1
                if seen >= after:
                    outcome.cut = True
                    break

    async def _disconnect(self, prompt: list[int], most: int, patience: float, outcome: Outcome) -> None:
        """Close the connection before the first token, unless that is early."""
        try:
            async with asyncio.timeout(patience):
                stream = await self._client.completions.create(
                    model=self._model, prompt=prompt, max_tokens=most, stream=True
                )
                async with stream:
                    async for _ in stream:
                        outcome.first = self.now
                        break
        except TimeoutError:
            outcome.cut = True

    async def _whole(self, one: Arrival, prompt: list[int], rng: random.Random, outcome: Outcome) -> None:
        """Answers that come as a whole: sampled, several, of a beam search, or structured.

        They have no seed: on a CPU, vLLM 0.32 ends if a prompt with one is read in several steps.
        """
        count, extra = 1, dict[str, Any]()
        if one.kind in ("several", "beam"):
            count = rng.randint(2, 3)
        if one.kind == "beam":
            extra["use_beam_search"] = True
        pattern = None
        if one.kind == "structured":
            if rng.random() < 0.5:
                extra["structured_outputs"], pattern = {"choice": list(CHOICES)}, "|".join(CHOICES)
            else:
                extra["structured_outputs"], pattern = {"regex": REGEX}, REGEX
        found = await self._client.completions.create(
            model=self._model,
            prompt=prompt,
            max_tokens=one.answer,
            temperature=0 if one.kind == "beam" else 1,
            n=count,
            extra_body=extra,
        )
        if len(found.choices) != count:
            outcome.wrong = f"{len(found.choices)} answers, where {count} were asked for"
        elif pattern and not all(re.fullmatch(pattern, choice.text) for choice in found.choices):
            outcome.wrong = "a structured answer is not of its form"
