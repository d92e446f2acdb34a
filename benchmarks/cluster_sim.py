"""Throughput and latency of N engines, extrapolated from the measured steps of one.

    python -m benchmarks.cluster_sim check results/serving_fox.json results/serving_fox_dp2.json
    python -m benchmarks.cluster_sim scale results/serving_fox.json --replicas 1 2 4 8 16 --traffic chat --load 0.8

A step of an engine costs ``a + b * prompt tokens read + c * rows + d * KV blocks in use``. `check` fits a..d to the
steps that a serving run recorded (non-negative least squares over stretches of 16 steps, since vLLM counts a prompt
in the step that ends it), simulates that run and any others of one or more such engines, and compares the total
times. `scale` sends traffic to N such engines:

* offline: the serving benchmark's requests, N times as many, all at once;
* chat and code: prompts and answers log-normal with the medians of Azure's public traces (Patel et al., Splitwise,
  arXiv 2311.18677: 1,020 and 129 tokens for conversation, 1,500 and 13 for code), arrivals in bursts (gamma gaps,
  squared coefficient of variation 4);
* documents: prompts of 16k tokens (log-normal, sigma 0.5) and answers of 512, bursts as above.

An arriving request goes to the engine with the fewest (vLLM's internal load balancer, Ray Serve). Engines share
nothing else: what is not modelled is the front end, and prompts long enough for attention to dominate.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.capacity import PAGE, live_share
from benchmarks.options import Parser, positive_float, positive_int
from benchmarks.record import saved

STRETCH = 16
BURSTINESS = 4.0  # squared coefficient of variation of the gaps between arrivals


@dataclass(frozen=True)
class Engine:
    """What one engine takes for a step, and what it holds.

    Attributes:
        cost: seconds: of a step, of a prompt token, of a row, of a KV block in use.
        blocks: KV blocks.
        rows: most requests at once (--max-num-seqs).
        budget: tokens of a step (--max-num-batched-tokens).
        pruned: whether dead pages are given back.
    """

    cost: tuple[float, float, float, float]
    blocks: int
    rows: int
    budget: int
    pruned: bool

    def step_seconds(self, read: int, rows: int, blocks: float) -> float:
        return float(np.dot(self.cost, (1, read, rows, blocks)))

    def held(self, tokens: int) -> float:
        """Blocks that a request of so many tokens holds."""
        return math.ceil(tokens / PAGE) * (live_share(tokens) if self.pruned else 1.0)


@dataclass
class Request:
    """Times in seconds; tokens."""

    arrival: float
    prompt: int
    answer: int
    read: int = 0
    answered: int = 0
    first_token: float = math.nan
    end: float = math.nan


@dataclass
class Replica:
    """One engine: continuous batching, first come first served, chunked prefill."""

    engine: Engine
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    peak: int = 0

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.running)

    def step(self, now: float) -> float:
        """Run a step; the time at its end."""
        engine, held = self.engine, self._held
        used = sum(held(one.read + one.answered) for one in self.running)
        rows = [one for one in self.running if one.read == one.prompt]
        budget = engine.budget - len(rows)
        read = 0
        for one in [one for one in self.running if one.read < one.prompt]:
            chunk = min(one.prompt - one.read, budget - read)
            one.read, read = one.read + chunk, read + chunk
        while self.waiting and read < budget and len(self.running) < engine.rows:
            need = held(self.waiting[0].prompt) + engine.budget / PAGE * engine.pruned
            if self.running and used + need > engine.blocks:
                break
            one = self.waiting.popleft()
            one.read = min(one.prompt, budget - read)
            read, used = read + one.read, used + held(one.prompt)
            self.running.append(one)
        self.peak = max(self.peak, len(self.running))
        end = now + engine.step_seconds(read, len(self.running), used)
        for one in self.running:
            if one.read == one.prompt:
                one.answered += 1
                if one.answered == 1:
                    one.first_token = end
                if one.answered >= one.answer:
                    one.end = end
        self.running = [one for one in self.running if math.isnan(one.end)]
        return end

    def _held(self, tokens: int) -> float:
        return _cached_held(self.engine, -(-tokens // PAGE) * PAGE)


_HELD: dict[tuple[Engine, int], float] = {}


def _cached_held(engine: Engine, tokens: int) -> float:
    if (engine, tokens) not in _HELD:
        _HELD[engine, tokens] = engine.held(max(tokens, 1))
    return _HELD[engine, tokens]


def simulate(engine: Engine, replicas: int, requests: list[Request]) -> list[Replica]:
    """Send requests to engines as they arrive; returns the engines, and fills in the requests' times."""
    cluster = [Replica(engine) for _ in range(replicas)]
    tie = itertools.count()
    events: list[tuple[float, int, Request | int]] = [(one.arrival, next(tie), one) for one in requests]
    heapq.heapify(events)
    idle = set(range(replicas))
    while events:
        now, _, what = heapq.heappop(events)
        if isinstance(what, Request):
            index = min(range(replicas), key=lambda i: cluster[i].load)
            cluster[index].waiting.append(what)
            if index not in idle:
                continue
            idle.remove(index)
        else:
            index = what
            if not cluster[index].load:
                idle.add(index)
                continue
        # All that has arrived by now is waiting before the step is put together.
        if events and events[0][0] <= now and isinstance(events[0][2], Request):
            heapq.heappush(events, (now, next(tie), index))
        else:
            heapq.heappush(events, (cluster[index].step(now), next(tie), index))
    return cluster


# Traffic: (requests a second or None for all at once, how many, random numbers) to requests.


def offline(count: int, prompt: int, answer: int) -> list[Request]:
    """All at once, all alike."""
    return [Request(0.0, prompt, answer) for _ in range(count)]


def bursts(
    prompt: tuple[float, float], answer: tuple[float, float]
) -> Callable[[float, int, np.random.Generator], list[Request]]:
    """Log-normal lengths (median, sigma) and gamma-distributed gaps between arrivals."""

    def make(rate: float, count: int, rng: np.random.Generator) -> list[Request]:
        gaps = rng.gamma(1 / BURSTINESS, BURSTINESS / rate, count)
        lengths = [
            np.clip(rng.lognormal(math.log(median), sigma, count), 1, 60_000).astype(int).tolist()
            for median, sigma in (prompt, answer)
        ]
        return [Request(float(time), *sizes) for time, *sizes in zip(np.cumsum(gaps), *lengths)]

    return make


TRAFFIC = {
    "chat": bursts((1020, 1.0), (129, 1.0)),
    "code": bursts((1500, 0.9), (13, 1.0)),
    "documents": bursts((16_384, 0.5), (512, 0.5)),
}


# The measured engine.


def saved_run(path: str) -> dict[str, Any]:
    """What a serving run saved. Raises SystemExit if the file holds no run of many requests."""
    figures = saved(path)
    if not isinstance(figures, dict) or "throughput" not in figures.get("result", {}):
        raise SystemExit(f"{path} holds no throughput of `python -m benchmarks.serving run`.")
    return figures


def read_run(path: str) -> tuple[Engine, dict]:
    """Fit an engine to a saved serving run; and the run."""
    from scipy.optimize import nnls

    figures = saved_run(path)
    run, options = figures["result"]["throughput"], figures["options"]
    steps = np.array(run["steps"], dtype=float)  # seconds, prompt tokens, answered, running, usage
    whole = len(steps) // STRETCH * STRETCH
    stretches = steps[:whole].reshape(-1, STRETCH, 5).sum(1)
    terms = np.stack(
        (
            np.full(len(stretches), STRETCH),
            stretches[:, 1],
            stretches[:, 3],
            stretches[:, 4] * run["blocks"],
        ),
        axis=1,
    )
    # Relative errors count, or long prompts would hide what a decode step costs.
    weight = 1 / stretches[:, 0]
    cost, _ = nnls(terms * weight[:, None], np.ones(len(stretches)))
    engine = Engine(
        tuple(cost.tolist()),
        run["blocks"],
        options["max_num_seqs"],
        options["max_num_batched_tokens"],
        figures["system"] == "fox",
    )
    return engine, figures


def check(paths: list[str]) -> None:
    """Simulated against measured, with the first run's engine, for each saved run."""
    engine, figures = read_run(paths[0])
    a, b, c, d = engine.cost
    print(
        f"{figures['system']}: a step {1e3 * a:.2f} ms + {1e6 * b:.2f} us a prompt token"
        f" + {1e6 * c:.1f} us a row + {1e6 * d:.2f} us a KV block"
    )
    for path in paths:
        figures = saved_run(path)
        run, options = figures["result"]["throughput"], figures["options"]
        requests = offline(options["requests"], options["prompt"], options["output"])
        replicas = options["data_parallel_size"]
        cluster = simulate(engine, replicas, requests)
        seconds = max(one.end for one in requests)
        print(
            f"{replicas} engine(s): simulated {seconds:.1f} s, measured {run['seconds']:.1f} s"
            f" ({seconds / run['seconds']:.2f}x);"
            f" most at once: {sum(one.peak for one in cluster)}, {run['peak_running']}"
        )


def scale(args: argparse.Namespace) -> None:
    """A table over the number of engines."""
    engine, figures = read_run(args.run)
    options = figures["options"]
    print(f"{figures['system']}, {args.traffic}, {args.load:.0%} of what one engine can do, times the engines")
    print(f"{'engines':>8}{'tokens/s':>12}{'of N x one':>12}{'first token p50':>17}{'p99':>9}{'a token p50':>13}")
    one = 0.0
    for replicas in args.replicas:
        if args.traffic == "offline":
            requests = offline(replicas * options["requests"], options["prompt"], options["output"])
        else:
            rate = args.load * replicas * capacity(engine, args.traffic)
            requests = TRAFFIC[args.traffic](rate, args.requests * replicas, np.random.default_rng(0))
        simulate(engine, replicas, requests)
        span = max(one.end for one in requests) - requests[0].arrival
        tokens = sum(request.answer for request in requests) / span
        one = one or tokens / replicas
        first = np.array([r.first_token - r.arrival for r in requests])
        each = np.array([(r.end - r.first_token) / max(1, r.answer - 1) for r in requests])
        print(
            f"{replicas:8}{tokens:12,.0f}{tokens / replicas / one:12.2f}{np.median(first):15.2f} s"
            f"{np.percentile(first, 99):7.2f} s{1e3 * np.median(each):10.1f} ms"
        )


def capacity(engine: Engine, traffic: str) -> float:
    """Requests a second that one engine completes when they never run out."""
    requests = TRAFFIC[traffic](1e9, 2000, np.random.default_rng(1))
    simulate(engine, 1, requests)
    return len(requests) / max(one.end for one in requests)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check")
    one.add_argument("runs", nargs="+", help="saved by `python -m benchmarks.serving run`")
    many = commands.add_parser("scale")
    many.add_argument("run")
    many.add_argument("--replicas", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16])
    many.add_argument("--traffic", choices=["offline", *TRAFFIC], default="chat")
    many.add_argument("--load", type=positive_float, default=0.8, help="share of what the engines can do at most")
    many.add_argument("--requests", type=positive_int, default=2000, help="for each engine")
    args = parser.parse_args()
    if args.command == "check":
        check(args.runs)
    else:
        scale(args)


if __name__ == "__main__":
    main()
