"""Requests answered in time, by a FoX (Pro) and by a dense Llama of the same size, as more and more arrive.

python -m benchmarks.goodput run --system fox --save results/goodput_fox.json
python -m benchmarks.goodput run --system dense --save results/goodput_dense.json
python -m benchmarks.goodput report results/goodput_*.json

Requests arrive one by one at random, so many a second on average (a Poisson process). Their lengths are those of
conversations with an assistant: drawn from the distributions that :data:`PROMPTS` and :data:`ANSWERS` describe, or
from a trace file whose lines are JSON with "input_length" and "output_length". All have the same length with
--prompt and --output. A request is in time if its first token comes within --first-ms, and each after it within
--each-ms on average.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.checkpoint import geometry_of
from benchmarks.options import (
    Parser,
    existing_file,
    inner_fraction,
    lines_of,
    positive_float,
    positive_int,
    read_text,
    refuse,
    seed_number,
)
from benchmarks.record import prepare, save, saved
from benchmarks.serving import add_engine_options, greedy, label, prompt, start_engine

PROMPTS = (6909, 12035)
"""Median and mean of prompts, in tokens: the conversations of Mooncake's traces (FAST 2025, arXiv 2407.00079)."""

ANSWERS = 343
"""Mean of their answers, whose lengths lie evenly between one token and twice as many."""

WARM_ANSWER = 32
"""Tokens of the answers before anything is measured."""

TRAFFIC = ("first_ms", "each_ms", "trace", "prompt", "output", "seconds", "seed", "max_model_len")
"""Options in which runs that are compared agree."""

GIVE_UP_S = 10.0
"""So long after the last arrival, requests that are not done are judged by the tokens that they have."""


class Lengths(NamedTuple):
    """Tokens of a request's prompt and of its answer."""

    prompt: int
    answer: int


@dataclass
class Request:
    """One request: when it is to arrive, in seconds; and when its tokens came, after its arrival."""

    arrival: float
    lengths: Lengths
    came: list[float] = field(default_factory=list)

    def in_time(self, first_s: float, each_s: float, until: float) -> bool:
        """Whether it was answered in time, as far as it was answered ``until`` so many seconds after the start."""
        if not self.came or self.came[0] > first_s:
            return False
        done = len(self.came) >= self.lengths.answer
        # The next token of a request that is not done has taken until now.
        last, after = (self.came[-1], len(self.came) - 1) if done else (until - self.arrival, len(self.came))
        return after == 0 or (last - self.came[0]) / after <= each_s


def conversation(rng: random.Random, longest: int) -> Lengths:
    """Lengths as in conversations. Both together are at most ``longest``, which is at least twice ANSWERS."""
    median, mean = PROMPTS
    answer = rng.randint(1, 2 * ANSWERS - 1)
    spread = math.sqrt(2 * math.log(mean / median))  # of a log-normal distribution with this mean
    return Lengths(min(max(1, round(rng.lognormvariate(math.log(median), spread))), longest - answer), answer)


def of_trace(path: Path, longest: int) -> list[Lengths]:
    """Lengths of a trace's requests, without those that have more than ``longest`` tokens together."""
    found = []
    for number, text in enumerate(lines_of(read_text(path)), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            lengths = Lengths(int(row["input_length"]), int(row["output_length"]))
        except (ValueError, TypeError, KeyError):
            refuse(f"--trace is {path}: line {number} is no JSON object with input_length and output_length.")
        if min(lengths) > 0 and sum(lengths) <= longest:
            found.append(lengths)
    if not found:
        refuse(f"--trace is {path}: it has no request of at most {longest:,} tokens (--max-model-len).")
    return found


def arrivals(args: argparse.Namespace, trace: list[Lengths], rate: float) -> list[Request]:
    """The requests of ``args.seconds`` at ``rate`` a second. The same arrive first at every rate, in less time."""
    rng, at = random.Random(args.seed), 0.0
    found: list[Request] = []
    while (at := at + rng.expovariate(rate)) < args.seconds:
        if args.prompt:
            lengths = Lengths(args.prompt, args.output)
        else:
            lengths = rng.choice(trace) if trace else conversation(rng, args.max_model_len)
        found.append(Request(at, lengths))
    return found


async def answer(engine: AsyncLLM, name: str, request: Request, tokens: list[int], start: float) -> None:
    """Send a request, whose prompt is ``tokens``, when it is to arrive, and note when its tokens come."""
    await asyncio.sleep(start + request.arrival - time.perf_counter())
    params = greedy(request.lengths.answer, RequestOutputKind.DELTA)
    async for output in engine.generate({"prompt_token_ids": tokens}, params, name):
        now = time.perf_counter() - start - request.arrival
        request.came += [now] * len(output.outputs[0].token_ids)


async def at_rate(engine: AsyncLLM, args: argparse.Namespace, requests: list[Request]) -> dict[str, Any]:
    """What share of the requests was answered in time, and how long they waited."""
    prompts = [prompt(engine, one.lengths.prompt, n) for n, one in enumerate(requests)]
    start = time.perf_counter()
    tasks = [
        asyncio.create_task(answer(engine, f"{n} of {len(requests)}", one, tokens, start))
        for n, (one, tokens) in enumerate(zip(requests, prompts, strict=True))
    ]
    done, left = await asyncio.wait(tasks, timeout=args.seconds + GIVE_UP_S)
    seconds = time.perf_counter() - start
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    for task in done:
        task.result()
    good = sum(one.in_time(args.first_ms / 1e3, args.each_ms / 1e3, seconds) for one in requests)
    first = sorted(1e3 * one.came[0] if one.came else math.inf for one in requests)
    each = sorted(1e3 * (one.came[-1] - one.came[0]) / (len(one.came) - 1) for one in requests if len(one.came) > 1)
    return {
        "requests": len(requests),
        "prompt_tokens": sum(one.lengths.prompt for one in requests),
        "answer_tokens": sum(one.lengths.answer for one in requests),
        "in_time": good / len(requests),
        "unfinished": len(left),
        "tokens_per_second": sum(len(one.came) for one in requests) / seconds,
        "first_ms": {str(q): _quantile(first, q) for q in (50, 90, 99)},
        "each_ms": {str(q): _quantile(each, q) for q in (50, 90, 99)},
    }


def _quantile(found: list[float], percent: int) -> float | None:
    """None where no token came."""
    value = found[min(len(found) - 1, len(found) * percent // 100)] if found else math.inf
    return value if math.isfinite(value) else None


async def run(args: argparse.Namespace, traffic: dict[float, list[Request]]) -> list[dict[str, Any]]:
    """Rates in rising order, up to the first at which fewer than half are in time."""
    engine = start_engine(args, args.max_model_len)
    try:
        for n in (900, 7000, 12000):  # what is compiled or captured late is not to count
            size = min(n, args.max_model_len - WARM_ANSWER)
            warm = Request(0.0, Lengths(size, WARM_ANSWER))
            await answer(engine, f"warm-up {n}", warm, prompt(engine, size, n), time.perf_counter())
        rows = []
        for rate, requests in sorted(traffic.items()):
            rows.append({"rate": rate} | await at_rate(engine, args, requests))
            print(line(rows[-1]), flush=True)
            if rows[-1]["in_time"] < 0.5:
                break
        return rows
    finally:
        engine.shutdown()


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def shown(value: float | None, digits: int) -> str:
        return "never" if value is None else f"{value:.{digits}f}"

    first, each = row["first_ms"], row["each_ms"]
    return (
        f"{row['rate']:8g} a second: {100 * row['in_time']:5.1f} % in time; first token "
        f"{shown(first['50'], 0)} ms (p90 {shown(first['90'], 0)}, p99 {shown(first['99'], 0)}), each after "
        f"{shown(each['50'], 1)} ms (p99 {shown(each['99'], 1)}), {row['tokens_per_second']:.0f} tokens/s"
    )


def most(rows: list[dict[str, Any]], share: float) -> float:
    """The highest rate at which so large a share is in time, and at all lower ones; 0 if there is none."""
    found = 0.0
    for row in rows:
        if row["in_time"] < share:
            break
        found = row["rate"]
    return found


def report(args: argparse.Namespace) -> None:
    """Join saved results to a table."""
    found: dict[str, Any] = {}
    for path in args.files:
        one = saved(path)
        if not isinstance(one, dict) or not {"system", "options", "rows"} <= one.keys():
            raise SystemExit(f"{path} holds no run of `python -m benchmarks.goodput run`.")
        if (name := label(one)) in found:
            raise SystemExit(f"{path} is another run of {name}: give one file of each.")
        found[name] = one
        kept = next(iter(found.values()))["options"]
        for option in TRAFFIC:
            if one["options"][option] != kept[option]:
                raise SystemExit(
                    f"{path} has --{option.replace('_', '-')} {one['options'][option]}, and the first file has "
                    f"{kept[option]}: only runs of the same traffic can be compared."
                )
        options = one["options"]
        print(f"{name}: first token within {options['first_ms']:g} ms, each after within {options['each_ms']:g} ms")
        for row in one["rows"]:
            print(line(row))
    for name, one in found.items():
        rate = most(one["rows"], args.share)
        lowest, highest = one["rows"][0]["rate"], one["rows"][-1]["rate"]
        said = f"fewer than {lowest:g}" if not rate else f"at least {rate:g}" if rate == highest else f"{rate:g}"
        print(f"{name}: {said} requests a second with {100 * args.share:g} % in time")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    add_engine_options(one)
    one.add_argument(
        "--rates", type=positive_float, nargs="+", default=[2, 4, 6, 8, 12, 16], help="requests a second"
    )
    one.add_argument("--seconds", type=positive_float, default=30, help="of arrivals at each rate")
    one.add_argument("--trace", type=existing_file, help="take lengths from this file")
    one.add_argument("--prompt", type=positive_int, help="tokens of every prompt, instead of conversations'")
    one.add_argument(
        "--output", type=positive_int, help=f"tokens of every answer, with --prompt (default: {ANSWERS})"
    )
    one.add_argument("--max-model-len", type=positive_int, default=131072)
    one.add_argument("--first-ms", type=positive_float, default=1000)
    one.add_argument("--each-ms", type=positive_float, default=50)
    one.add_argument("--seed", type=seed_number, default=0)
    joined = commands.add_parser("report")
    joined.add_argument("files", nargs="+")
    joined.add_argument("--share", type=inner_fraction, default=0.9, help="of requests that are to be in time")
    args = parser.parse_args()
    if args.command == "report":
        report(args)
        return
    geometry_of(args)
    if args.prompt and args.trace:
        one.error("--prompt and --trace exclude one another: both say how long prompts are.")
    if args.output and not args.prompt:
        one.error(f"--output is {args.output}: it goes with --prompt only.")
    args.output = args.output or ANSWERS
    if args.prompt and args.prompt + args.output > args.max_model_len:
        one.error(
            f"--prompt is {args.prompt}: with answers of {args.output} tokens it must be at most --max-model-len "
            f"{args.max_model_len}."
        )
    if args.max_model_len < 2 * ANSWERS:
        one.error(f"--max-model-len is {args.max_model_len}: it must be at least {2 * ANSWERS}.")
    if args.save:
        prepare("--save", Path(args.save))
    trace = of_trace(args.trace, args.max_model_len) if args.trace else []
    traffic = {rate: arrivals(args, trace, rate) for rate in args.rates}
    for rate, requests in traffic.items():
        if not requests:
            one.error(f"--rates has {rate:g}: within --seconds, {args.seconds:g}, no request arrives.")
    rows = asyncio.run(run(args, traffic))
    if args.save:
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        save(args.save, {"system": args.system, "options": options, "rows": rows})


if __name__ == "__main__":
    main()
