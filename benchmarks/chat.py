"""What chat costs with and without prefix caching: a FoX (Pro) and a dense Llama of its size, in the same memory.

python -m benchmarks.chat [--plot docs/chat.png]        # all systems and parts in one run
python -m benchmarks.chat --host-gib 32                 # also with cached pages in host memory
python -m benchmarks.chat --tiny                        # on a CPU: the shipped model, and small sizes
python -m benchmarks.chat --report results/chat.json --plot docs/chat.png

Each system has an engine in a process of its own, started once for all parts. The engines stay until the end and
are measured in turn, so that a slow spell of the machine meets all. The parts:

- turns: conversations that share a system prompt, all at once; time to the first token by turn, and how many of the
  prompts' tokens were found in the cache, beside a cache of unlimited memory (hits).
- throughput: more conversations; tokens answered per second.
- documents: a long document, and a second question about it.
- kept: conversations in a round; how many are still cached when their next turn comes.
- unshared: prompts that share nothing; what caching costs when it is of no use.
- returning (with --host-gib): many more conversations than GPU memory has room for, one after the other; then each
  has a second turn, in another order. How many tokens of the first turns are hit, and the time to the first token.

After every engine and part all that is known so far is saved.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.checkpoint import Geometry, add_geometry_options, geometry_of, ready, write_fox, write_llama
from benchmarks.engine_process import EngineProcess, engine_processes
from benchmarks.options import (
    Parser,
    fraction,
    integer,
    non_negative_float,
    positive_float,
    positive_int,
    read_record,
    refuse,
)
from benchmarks.record import save, saved
from vllm_fox.cpu import KV_CACHE_SPACE, prepare_cpu_environment

if TYPE_CHECKING:
    from vllm import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

HOST = "fox-host"
"""The system whose cached pages go to host memory."""
SYSTEMS = ("fox", HOST, "fox-off", "dense", "dense-off")
PARTS = ("turns", "throughput", "documents", "kept", "unshared", "returning")
ROUNDS = ("turns", "unshared")
"""Parts that are measured in rounds, because differences are small beside what a machine's speed varies."""
TOKENS = ("prompt_tokens", "cached_tokens", "unlimited_tokens")
BLOCK = 16
"""Tokens per block of a dense cache by vLLM's default on a GPU. What could be hit at best is counted in these."""
QUESTION, SHORT_ANSWER = 100, 8
"""Tokens of a question about a document, and of answers where only the first token matters."""
KEPT_RATE = 0.9
"""Share of the tokens that must be hit for a number of conversations to count as kept."""
TINY: dict[str, Any] = {
    "model": Path(__file__).parent.parent / "examples" / "fox-tiny",
    "kv_gib": 0.0625,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "engines_at_once": 1,
    "conversations": 4,
    "system_tokens": 256,
    "turns": 3,
    "user_tokens": 64,
    "answer_tokens": 16,
    "throughput_conversations": 8,
    "document_tokens": 1024,
    "documents": 2,
    "kept_tokens": 512,
    "kept_most": 32,
    "kept_precision": 0.34,
    "returning_conversations": 48,
    "requests": 8,
    "prompt_tokens": 256,
    "rounds": 1,
}
"""Defaults under --tiny."""


# Helpers that know no engine.


@dataclass
class Turn:
    """One request of a conversation, in the order in which they were sent.

    Attributes:
        turn: from 1.
        first: seconds to the first token.
        cached: tokens of the prompt that were found in the cache.
    """

    conversation: int
    turn: int
    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    first: float = 0.0
    cached: int = 0


def random_tokens(seed: str, count: int, vocab: int) -> list[int]:
    """Token ids without the first ones, which often have a meaning of their own; the same for the same seed."""
    return random.Random(seed).choices(range(10, vocab), k=count)


def unlimited_hits(requests: Iterable[tuple[Sequence[int], Sequence[int]]], block: int = BLOCK) -> list[int]:
    """Tokens that a cache which never forgets would find of each prompt.

    It finds full blocks, and leaves the last token of a prompt to be computed, as vLLM does.

    Args:
        requests: prompt and answer of each, in the order in which they were sent. Those sent at the same time find
            each other's prompts: what one computes, the next shares.
        block: tokens per block.
    """
    known: set[int] = set()
    found = []
    for prompt, answer in requests:
        # The last token of an answer is never computed.
        tokens = [*prompt, *answer[:-1]]
        keys, key = [], 0
        for end in range(block, len(tokens) + 1, block):
            key = hash((key, *tokens[end - block : end]))
            keys.append(key)
        usable = (len(prompt) - 1) // block
        hits = next((index for index, key in enumerate(keys[:usable]) if key not in known), min(usable, len(keys)))
        found.append(hits * block)
        known.update(keys)
    return found


async def largest(holds: Callable[[int], Awaitable[bool]], start: int, most: int, precision: float = 0.0) -> int:
    """The largest number from 0 to ``most`` for which ``holds`` is true, if it is so for all smaller ones.

    Args:
        start: the first that is tried; then double or half as many, then what lies between.
        precision: share of the number by which the answer may be too small.
    """
    low, high, number = 0, most + 1, max(1, min(start, most))
    while True:
        if await holds(number):
            low = number
        else:
            high = number
        if high - low <= max(1, precision * low):
            return low
        if high > most:
            number = min(2 * low, most)
        elif low == 0:
            number = high // 2
        else:
            number = (low + high) // 2


def by_turn(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Times to the first token and hits of each turn, over all conversations."""
    best = unlimited_hits((one.prompt, one.answer) for one in turns)
    rows = []
    for number in sorted({one.turn for one in turns}):
        mine = [(one, hits) for one, hits in zip(turns, best) if one.turn == number]
        rows.append(
            {
                "turn": number,
                "all_ms": [1e3 * one.first for one, _ in mine],
                "prompt_tokens": sum(len(one.prompt) for one, _ in mine),
                "cached_tokens": sum(one.cached for one, _ in mine),
                "unlimited_tokens": sum(hits for _, hits in mine),
            }
        )
    return rows


def together(part: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rounds of one part of a system as one. Parts without rounds have one."""
    if part == "unshared":
        rate = statistics.median(one["output_tokens_per_second"] for one in rounds)
        return {"output_tokens_per_second": rate, "rounds": list(rounds)}
    if part != "turns":
        (one,) = rounds
        return one
    rows = []
    for same in zip(*(one["rows"] for one in rounds)):
        first = [ms for row in same for ms in row["all_ms"]]
        rows.append(
            {
                "turn": same[0]["turn"],
                "median_ms": statistics.median(first),
                "p99_ms": float(np.percentile(first, 99)),
                "all_ms": first,
                **{key: sum(row[key] for row in same) for key in TOKENS},
            }
        )
    cached, best = (sum(row[key] for row in rows) for key in ("cached_tokens", "unlimited_tokens"))
    seconds = [one["seconds"] for one in rounds]
    return {"seconds": seconds, "rows": rows, "hit_share": cached / best if best else None}


def longest_requests(args: argparse.Namespace) -> dict[str, int]:
    """Tokens of the longest request of each chosen part, answer included."""
    turn = args.user_tokens + args.answer_tokens
    longest = {
        "turns": args.system_tokens + args.turns * turn,
        "throughput": args.system_tokens + (args.throughput_turns or args.turns) * turn,
        "documents": args.document_tokens + QUESTION + SHORT_ANSWER,
        "kept": args.kept_tokens + args.user_tokens + 2 * SHORT_ANSWER,
        "unshared": args.prompt_tokens + args.answer_tokens,
        "returning": args.kept_tokens + args.user_tokens + 2 * SHORT_ANSWER,
    }
    return {part: longest[part] for part in args.parts}


def measured(system: str, part: str) -> bool:
    """Whether a part is measured of a system.

    Without caching nothing is kept, and how much more host memory keeps is what "returning" is about.
    """
    if part == "kept":
        return system in ("fox", "dense")
    return part != "returning" or not system.endswith("-off")


# In the process of an engine.


def _serve(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    # It would override --kv-gib.
    os.environ.pop(KV_CACHE_SPACE, None)
    # Engines that compile the same model at the same time would write the same files.
    os.environ["VLLM_CACHE_ROOT"] = str(Path(os.environ.get("VLLM_CACHE_ROOT", args.models), f"compiled-{name}"))
    asyncio.run(_answer_all(name, pipe, model, args))


async def _answer_all(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from benchmarks.serving import Recorder

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {}
    if gpu:
        # What vLLM wants to find free, not what it takes: that --kv-gib says.
        options["gpu_memory_utilization"] = 0.8 / min(args.engines_at_once, len(args.systems))
        if args.graph_sizes:
            options["compilation_config"] = {"cudagraph_capture_sizes": sorted(args.graph_sizes)}
    if name == HOST:
        options["additional_config"] = {"fox": {"host_cache_gib": args.host_gib}}
    if name.startswith("dense"):
        options["load_format"] = "dummy"
        if gpu:
            options["attention_backend"] = "FLASH_ATTN"
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype="bfloat16" if gpu else "float32",
            enforce_eager=args.enforce_eager or not gpu,
            kv_cache_memory_bytes=int(args.kv_gib * 2**30),
            max_model_len=max(longest_requests(args).values()),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=not name.endswith("-off"),
            skip_tokenizer_init=True,
            disable_log_stats=False,
            seed=0,
            **options,
        ),
        stat_loggers=[Recorder],
    )
    try:
        chat = Chat(engine, name, args)
        await chat.warm_up()
        pipe.send(None)
        while (job := await asyncio.to_thread(pipe.recv)) is not None:
            part, round_number = job
            await chat.start_afresh()
            pipe.send(await getattr(chat, part)(round_number))
    finally:
        engine.shutdown()


class Chat:
    """The parts, of one engine. Each takes the number of the round, and returns its figures."""

    def __init__(self, engine: AsyncLLM, name: str, args: argparse.Namespace) -> None:
        self.engine, self.name, self.args = engine, name, args
        self.vocab = engine.model_config.get_vocab_size()
        self._asked = 0

    async def ask(self, prompt: list[int], answer: int, stream: bool = True) -> Turn:
        """One request, from its prompt to its last token. Unless it is streamed, its first comes with its last."""
        turn = Turn(0, 0, prompt)
        await self._ask(turn, answer, stream)
        return turn

    async def _ask(self, turn: Turn, answer: int, stream: bool) -> None:
        from vllm.sampling_params import RequestOutputKind

        from benchmarks.serving import greedy

        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        self._asked += 1
        out: RequestOutput | None = None
        start = time.perf_counter()
        async for out in self.engine.generate(
            {"prompt_token_ids": turn.prompt}, greedy(answer, kind), f"{self.name} {self._asked}"
        ):
            if not turn.answer:
                turn.first = time.perf_counter() - start
            turn.answer += out.outputs[0].token_ids
        assert out is not None and len(turn.answer) == answer
        turn.cached = out.num_cached_tokens or 0

    async def warm_up(self) -> None:
        """Let kernels be compiled, for prompts in pieces and for such that go on from what is cached."""
        long = min(
            max(longest_requests(self.args).values()) - SHORT_ANSWER, self.args.max_num_batched_tokens + BLOCK
        )
        for _ in range(2):
            await self.ask(self._random("warm-up", long), SHORT_ANSWER)
        count, turns = min(8, self.args.conversations), min(2, self.args.turns)
        await self.converse("warm-up", count, turns, 0.0, stream=True)

    async def start_afresh(self) -> None:
        """Empty the cache, so that no part profits from another."""
        # Requests that were cancelled, and reports of pages, may be under way for some steps yet.
        for _ in range(100):
            if await self.engine.reset_prefix_cache():
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"{self.name}: the prefix cache could not be reset, as if requests were still running.")

    async def converse(
        self, seed: str, conversations: int, turns: int, pause: float, stream: bool, limit: float | None = None
    ) -> list[Turn]:
        """Conversations with a system prompt in common, all at once; those of their turns that have begun.

        Args:
            pause: mean of the seconds before each turn; they are drawn from an exponential distribution.
            stream: whether times to the first token are wanted.
            limit: seconds after which all is cancelled.
        """
        args, done = self.args, list[Turn]()
        shared = self._random(f"{seed}, shared", args.system_tokens)

        async def one(index: int) -> None:
            tokens, pauses = list(shared), random.Random(f"{seed}, pauses of {index}")
            for number in range(1, turns + 1):
                if pause:
                    await asyncio.sleep(pauses.expovariate(1 / pause))
                tokens += self._random(f"{seed}, {index}, {number}", args.user_tokens)
                done.append(Turn(index, number, list(tokens)))
                turn = done[-1]
                await self._ask(turn, args.answer_tokens, stream)
                tokens += turn.answer

        tasks = [asyncio.create_task(one(index)) for index in range(conversations)]
        finished, left = await asyncio.wait(tasks, timeout=limit)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in finished:
            task.result()
        return done

    async def turns(self, round_number: int) -> dict[str, Any]:
        """Time to the first token by turn."""
        args = self.args
        start = time.perf_counter()
        done = await self.converse(
            f"turns, {round_number}", args.conversations, args.turns, args.pause, stream=True
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "rows": by_turn(done)}

    async def throughput(self, round_number: int) -> dict[str, Any]:
        """Tokens answered per second in many conversations."""
        args, turns = self.args, self.args.throughput_turns or self.args.turns
        steps, count = self._restarted(), args.throughput_conversations
        start = time.perf_counter()
        done = await self.converse("throughput", count, turns, 0.0, stream=False, limit=args.limit_seconds)
        seconds = time.perf_counter() - start
        return {
            "complete": sum(bool(one.answer) for one in done) == count * turns,
            "cached_tokens": sum(one.cached for one in done),
            **steps(seconds),
        }

    async def documents(self, round_number: int) -> dict[str, Any]:
        """Milliseconds to the first token of two questions about each of some documents, one after the other."""
        times: dict[str, list[float]] = {"first": [], "second": []}
        cached: dict[str, list[int]] = {"first": [], "second": []}
        # The first document warms up.
        for number in range(self.args.documents + 1):
            document = self._random(f"document {number}", self.args.document_tokens)
            for which in times:
                question = self._random(f"{which} question about document {number}", QUESTION)
                turn = await self.ask(document + question, SHORT_ANSWER)
                if number:
                    times[which].append(1e3 * turn.first)
                    cached[which].append(turn.cached)
        return {
            **{f"{which}_ms": statistics.median(found) for which, found in times.items()},
            **{f"all_{which}_ms": found for which, found in times.items()},
            **{f"{which}_cached_tokens": found for which, found in cached.items()},
        }

    async def kept(self, round_number: int) -> dict[str, Any]:
        """How many conversations stay cached while each waits for its turn."""
        args = self.args
        trials: list[dict[str, Any]] = []

        async def holds(count: int) -> bool:
            await self.start_afresh()
            before = []
            for index in range(count):
                prompt = self._random(f"kept {index} of {count}", args.kept_tokens)
                before.append(await self.ask(prompt, SHORT_ANSWER, stream=False))
            hits = 0
            for index, one in enumerate(before):
                more = self._random(f"more of {index} of {count}", args.user_tokens)
                hits += (await self.ask(one.prompt + one.answer + more, SHORT_ANSWER, stream=False)).cached
            rate = hits / sum(len(one.prompt) + len(one.answer) for one in before)
            trials.append({"conversations": count, "hit_rate": rate})
            return rate >= KEPT_RATE

        # Where the targets lie: as many as fit into a dense cache, and four times as many.
        start = self._dense_room() // args.kept_tokens * (1 if self.name == "dense" else 4)
        found = await largest(holds, start, args.kept_most, args.kept_precision)
        return {"conversations": found, "trials": trials}

    async def returning(self, round_number: int) -> dict[str, Any]:
        """Second turns of conversations of which many have gone from GPU memory since their first."""
        args = self.args
        before = []
        for index in range(args.returning_conversations):
            prompt = self._random(f"returning {index}", args.kept_tokens)
            before.append(await self.ask(prompt, SHORT_ANSWER, stream=False))
        done = []
        for index in random.Random("returning").sample(range(len(before)), len(before)):
            more = self._random(f"more of returning {index}", args.user_tokens)
            done.append(await self.ask(before[index].prompt + before[index].answer + more, SHORT_ANSWER))
        first = [1e3 * one.first for one in done]
        return {
            "conversations": len(before),
            "hit_rate": sum(one.cached for one in done) / sum(len(one.prompt) + len(one.answer) for one in before),
            "median_ms": statistics.median(first),
            "all_ms": first,
        }

    async def unshared(self, round_number: int) -> dict[str, Any]:
        """Tokens answered per second to prompts that share nothing."""
        args, steps = self.args, self._restarted()
        prompts = [
            self._random(f"unshared, {round_number}, {index}", args.prompt_tokens) for index in range(args.requests)
        ]
        start = time.perf_counter()
        done = await asyncio.gather(*(self.ask(one, args.answer_tokens, stream=False) for one in prompts))
        seconds = time.perf_counter() - start
        return {"cached_tokens": sum(one.cached for one in done), **steps(seconds)}

    # Internal helpers.

    def _random(self, seed: str, count: int) -> list[int]:
        return random_tokens(seed, count, self.vocab)

    def _dense_room(self) -> int:
        """Tokens of a dense model whose K and V fit into the memory."""
        config = self.engine.model_config.hf_config
        itemsize = 2 if torch.cuda.is_available() else 4
        return int(self.args.kv_gib * 2**30) // (2 * config.num_hidden_layers * config.hidden_size * itemsize)

    def _restarted(self) -> Callable[[float], dict[str, Any]]:
        """Begin to record steps; what is returned sums them up."""
        from benchmarks.serving import Recorder

        (recorder,) = Recorder.engines
        recorder.restart()

        def summed(seconds: float) -> dict[str, Any]:
            read, answered = (sum(step[column] for step in recorder.steps) for column in (1, 2))
            return {
                "seconds": seconds,
                "prompt_tokens": read,
                "output_tokens": answered,
                "output_tokens_per_second": answered / seconds,
                "mean_running": sum(step[0] * step[3] for step in recorder.steps) / seconds,
                "peak_kv_usage": max((step[4] for step in recorder.steps), default=0.0),
                "preemptions": recorder.preemptions,
            }

        return summed


# The program's process.


def models_of(args: argparse.Namespace) -> Callable[[str], Path]:
    """The folder of each system's model, which is written when it is asked for and not there yet."""
    if args.model is None:
        size = geometry_of(args)
    else:
        config = read_record(args.model / "config.json") or {}
        names = ("num_hidden_layers", "hidden_size", "num_heads", "vocab_size", "max_position_embeddings")
        if not all(isinstance(config.get(name), int) for name in names):
            refuse(f"--model is {args.model}: it must be a folder with a FoX in the dialect of the official code.")
        size = Geometry(*(config[name] for name in names))
    for part, tokens in longest_requests(args).items():
        if tokens > size.max_positions:
            refuse(
                f"The longest request of {part} has {tokens} tokens: the model has {size.max_positions} positions."
            )
    folder = Path(args.models)

    def of(system: str) -> Path:
        if system.startswith("dense"):
            return ready(folder / f"llama-{size.name}", write_llama, size)
        return args.model or ready(folder / f"fox-{size.name}", write_fox, size)

    return of


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All parts of all systems, saved after each."""
    model_of = models_of(args)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    systems: dict[str, dict[str, Any]] = {name: {} for name in args.systems}
    figures = {"options": options, "systems": systems}
    for group in (
        args.systems[n : n + args.engines_at_once] for n in range(0, len(args.systems), args.engines_at_once)
    ):
        # Dense ones first: while they start, the weights of the others are made.
        each = ((name, str(model_of(name)), args) for name in sorted(group))
        with engine_processes(_serve, each) as engines:
            by_name = {engine.name: engine for engine in engines}
            for part in args.parts:
                _measure(part, {name: by_name[name] for name in group if measured(name, part)}, figures, args)
                print(table(systems, part), flush=True)
    return figures


def _measure(
    part: str, engines: dict[str, EngineProcess], figures: dict[str, Any], args: argparse.Namespace
) -> None:
    """One part of some systems."""
    systems = figures["systems"]
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for number in range(args.rounds if part in ROUNDS else 1):
        # There and back, so that none is always the first.
        for name in list(engines)[:: -1 if number % 2 else 1]:
            rounds[name].append(engines[name].measure(part, number))
            systems[name][part] = together(part, rounds[name])
            figures["targets"] = [vars(one) | {"met": one.met} for one in targets(systems)]
            save(args.json, figures)


# What is said.


@dataclass(frozen=True)
class Target:
    """A figure of ours beside that of a peer.

    Attributes:
        least: whether ``ratio`` must be at least ``limit``, else at most.
        strict: whether ``limit`` itself is not enough.
    """

    what: str
    ours: float
    peer: float
    ratio: float
    limit: float
    least: bool
    strict: bool = False

    @property
    def met(self) -> bool:
        if self.ratio == self.limit:
            return not self.strict
        return (self.ratio > self.limit) == self.least


def targets(systems: dict[str, dict[str, Any]]) -> list[Target]:
    """All that can be said of what was measured."""
    found: list[Target] = []

    def add(what: str, ours: float, peer: float, limit: float, least: bool, strict: bool = False) -> None:
        if peer:
            found.append(Target(what, ours, peer, ours / peer, limit, least, strict))

    def both(part: str, peer: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        pair = systems.get("fox", {}).get(part), systems.get(peer, {}).get(part)
        return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])

    rate = "output_tokens_per_second"
    if pair := both("turns", "dense"):
        for mine, row in zip(pair[0]["rows"], pair[1]["rows"]):
            for key, name in (("median_ms", "median"), ("p99_ms", "99th percentile")):
                what = f"ms to the first token, turn {mine['turn']}, {name}"
                add(what, mine[key], row[key], 1.0, least=False, strict=mine["turn"] >= 4)
    if pair := both("turns", "fox"):
        cached, best = (sum(row[key] for row in pair[0]["rows"]) for key in ("cached_tokens", "unlimited_tokens"))
        add("tokens hit, of unlimited memory's", cached, best, 0.95, least=True)
    if pair := both("throughput", "dense"):
        add("tokens/s in conversations", pair[0][rate], pair[1][rate], 1.3, least=True)
    if pair := both("documents", "fox"):
        add("ms to the second answer, of the first", pair[0]["second_ms"], pair[0]["first_ms"], 1 / 3, False, True)
    if pair := both("kept", "dense"):
        add("conversations kept", pair[0]["conversations"], pair[1]["conversations"], 4.0, least=True)
    if pair := both("unshared", "fox-off"):
        add("tokens/s, nothing shared, of caching off", pair[0][rate], pair[1][rate], 0.98, least=True)
    fox, host = systems.get("fox", {}), systems.get(HOST, {})
    if "returning" in fox and "returning" in host:
        ours, peer = host["returning"]["hit_rate"], fox["returning"]["hit_rate"]
        add("hit rate of returning, with host memory", ours, peer, 3.0, least=True)
    if "unshared" in fox and "unshared" in host:
        ours, peer = host["unshared"][rate], fox["unshared"][rate]
        add("tokens/s, nothing shared, with host memory", ours, peer, 0.97, least=True)
    return found


def table(systems: dict[str, dict[str, Any]], part: str) -> str:
    """One part, a line for each system."""
    rows = {name: found[part] for name, found in systems.items() if part in found}
    lines = [part]
    if part == "turns" and rows:
        numbers = [row["turn"] for row in next(iter(rows.values()))["rows"]]
        lines.append(f"  {'ms to the first token':<30}" + "".join(f"{f'turn {number}':>10}" for number in numbers))
        for name, row in rows.items():
            for key, what in (("median_ms", "median"), ("p99_ms", "99th percentile")):
                cells = "".join(f"{one[key]:>10.1f}" for one in row["rows"])
                lines.append(f"  {name + ', ' + what:<30}{cells}")
        for name, row in rows.items():
            cells = "".join(f"{one['cached_tokens'] / one['prompt_tokens']:>10.1%}" for one in row["rows"])
            lines.append(f"  {name + ', of prompts cached':<30}{cells}")
        for name, row in rows.items():
            if row["hit_share"] is not None:
                lines.append(f"  {name}: {row['hit_share']:.1%} of what a cache of unlimited memory hits")
        return "\n".join(lines)
    for name, row in rows.items():
        if part == "documents":
            ratio = row["second_ms"] / row["first_ms"]
            said = f"first {row['first_ms']:.1f} ms, second {row['second_ms']:.1f} ms ({ratio:.2f}x)"
        elif part == "returning":
            said = f"{row['hit_rate']:.1%} of {row['conversations']} conversations' first turns hit, "
            said += f"{row['median_ms']:.1f} ms to the first token of the second, median"
        elif part == "kept":
            trials = ", ".join(f"{one['conversations']}: {one['hit_rate']:.1%}" for one in row["trials"])
            said = f"{row['conversations']} conversations (hit rates: {trials})"
        else:
            said = f"{row['output_tokens_per_second']:,.0f} tokens/s"
            if part == "throughput":
                said += f", {row['mean_running']:.1f} running on average, {row['preemptions']} preempted"
                said += "" if row["complete"] else f", stopped after {row['seconds']:.0f} s"
        lines.append(f"  {name:<10}{said}")
    return "\n".join(lines)


def report(figures: dict[str, Any], plot: str | None) -> None:
    """Print every part and what it is held against."""
    systems = figures["systems"]
    for part in PARTS:
        if any(part in found for found in systems.values()):
            print(table(systems, part))
    if targets(systems):
        print(f"{'':<42}{'ours':>12}{'peer':>12}{'ratio':>9}{'target':>12}{'met':>6}")
    for one in targets(systems):
        sign = (">" if one.least else "<") + ("" if one.strict else "=")
        limit = f"{sign} {one.limit:.2f}"
        ours, peer = (f"{number:,.0f}" if number >= 1000 else f"{number:.4g}" for number in (one.ours, one.peer))
        print(f"{one.what:<42}{ours:>12}{peer:>12}{one.ratio:>9.3f}{limit:>12}{'yes' if one.met else 'no':>6}")
    if plot:
        _plot(plot, systems, figures["options"])


def _plot(path: str, systems: dict[str, dict[str, Any]], options: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axis = pyplot.subplots(figsize=(7, 4))
    styles = {
        "fox": ("#0b6e4f", "-"),
        HOST: ("#0b6e4f", "--"),
        "fox-off": ("#0b6e4f", ":"),
        "dense": ("#b23a48", "-"),
    }
    for name, found in systems.items():
        if "turns" in found:
            rows = found["turns"]["rows"]
            colour, line = styles.get(name, ("#b23a48", ":"))
            numbers, median = [row["turn"] for row in rows], [row["median_ms"] for row in rows]
            axis.plot(numbers, median, color=colour, linestyle=line, marker="o", markersize=3, label=name)
    axis.set_title(
        f"{options['conversations']} conversations at once, {options['system_tokens']:,} tokens in common"
    )
    axis.set_xlabel("turn")
    axis.set_ylabel("time to the first token, median (ms)")
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"saved {path}")


def joined(paths: Sequence[str]) -> dict[str, Any]:
    """The parts of several saved runs; what a later one has replaces what an earlier one has."""
    figures: dict[str, Any] = {"options": {}, "systems": {}}
    for path in paths:
        one = saved(path)
        if not isinstance(one, dict) or "systems" not in one:
            raise SystemExit(f"{path} holds no run of `python -m benchmarks.chat`.")
        figures["options"] = one["options"]
        for name, found in one["systems"].items():
            figures["systems"].setdefault(name, {}).update(found)
    return figures


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--systems",
        choices=SYSTEMS,
        nargs="+",
        help=f"-off: without caching; {HOST} needs --host-gib. All unless given",
    )
    parser.add_argument(
        "--parts", choices=PARTS, nargs="+", help="all unless given; returning only if there is --host-gib"
    )
    parser.add_argument("--tiny", action="store_true", help="small defaults and the shipped model, for a CPU")
    parser.add_argument("--model", type=Path, help="a FoX; one of the sizes below with random weights without")
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "vllm-fox-bench"))
    add_geometry_options(parser)
    parser.add_argument("--kv-gib", type=positive_float, default=12.0, help="KV memory of each engine, in GiB")
    parser.add_argument("--host-gib", type=positive_float, help=f"host memory for cached pages of {HOST}, in GiB")
    parser.add_argument("--max-num-seqs", type=positive_int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=positive_int, default=8192)
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile; always so on a CPU")
    parser.add_argument(
        "--graph-sizes",
        type=positive_int,
        nargs="+",
        help="tokens of a step for which CUDA graphs are captured: with few an engine starts sooner",
    )
    parser.add_argument(
        "--engines-at-once",
        type=integer(1, len(SYSTEMS)),
        default=len(SYSTEMS),
        help="with fewer than there are --systems these take turns, in the order given, with more --kv-gib each",
    )
    turns = parser.add_argument_group("turns")
    turns.add_argument("--conversations", type=positive_int, default=32)
    turns.add_argument("--system-tokens", type=integer(0), default=2048, help="of the prompt that all share")
    turns.add_argument("--turns", type=positive_int, default=8)
    turns.add_argument("--user-tokens", type=positive_int, default=512)
    turns.add_argument("--answer-tokens", type=positive_int, default=128)
    turns.add_argument("--pause", type=non_negative_float, default=0.0, help="mean seconds before a user's turn")
    throughput = parser.add_argument_group("throughput")
    throughput.add_argument("--throughput-conversations", type=positive_int, default=128)
    throughput.add_argument("--throughput-turns", type=positive_int, help="as many as --turns unless given")
    throughput.add_argument(
        "--limit-seconds", type=positive_float, help="stop each system then, with what it has done"
    )
    documents = parser.add_argument_group("documents")
    documents.add_argument("--documents", type=positive_int, default=5)
    documents.add_argument("--document-tokens", type=positive_int, default=16384)
    kept = parser.add_argument_group("kept")
    kept.add_argument("--kept-tokens", type=integer(512), default=16384, help="of each conversation")
    kept.add_argument(
        "--kept-most", type=positive_int, default=256, help="the search ends at so many conversations"
    )
    kept.add_argument("--kept-precision", type=fraction, default=0.1, help="by which share they may be too few")
    returning = parser.add_argument_group("returning, of --kept-tokens")
    returning.add_argument("--returning-conversations", type=positive_int, default=64)
    unshared = parser.add_argument_group("unshared")
    unshared.add_argument("--requests", type=positive_int, default=64)
    unshared.add_argument("--prompt-tokens", type=positive_int, default=4096)
    parser.add_argument("--rounds", type=positive_int, default=5, help=f"of {' and '.join(ROUNDS)}")
    parser.add_argument("--json", default="results/chat.json", help="where the figures go")
    parser.add_argument("--plot", help="PNG for the time to the first token by turn")
    parser.add_argument("--report", nargs="+", help="print and plot saved runs of one machine instead of measuring")
    args = parser.parse_args()
    if args.tiny:
        parser.set_defaults(**TINY)
        args = parser.parse_args()
    if args.report:
        report(joined(args.report), args.plot)
        return
    if HOST in (args.systems or ()) and not args.host_gib:
        refuse(f"--systems has {HOST}: --host-gib must say how much host memory it gets.")
    every = [system for system in SYSTEMS if system != HOST or args.host_gib]
    parts = [part for part in PARTS if part != "returning" or args.host_gib]
    # Asked for twice, an engine would be started twice.
    args.systems, args.parts = (list(dict.fromkeys(one)) for one in (args.systems or every, args.parts or parts))
    prepare_cpu_environment(kv_cache_space=False, threads=1)
    report(compare(args), args.plot)


if __name__ == "__main__":
    main()
