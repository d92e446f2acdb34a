"""Leave a server alone under a mixed load: does it answer rightly, give every page back, and keep its memory?

python -m benchmarks.soak examples/fox-tiny --minutes 5 --plot soak.png

It starts `vllm serve MODEL` in float32 with little KV memory, and sends requests with Poisson arrivals: greedy and
sampled ones of all lengths, chats, several answers, beam searches, structured output, streams that are closed after
some tokens, and connections that are closed before the first. When the load is over and the server is idle, a
sample of the greedy requests is asked for again, alone. The exit code is 1 if a request failed, an answer was
wrong, a page or a request was left over, or memory grew; and if the run was too short to show that.

Ctrl-C ends the load early, or the comparison of answers if the load is over. What has run until then is judged and
saved. A second one ends everything.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.util
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import psutil

from benchmarks.bound import load_tokenizer
from benchmarks.options import Parser, positive_float, positive_int, refuse, seed_number
from benchmarks.record import prepare, save
from benchmarks.soak_load import BOUND, Answer, Load, Outcome, arrivals, difference, kind_of_error
from benchmarks.soak_verdict import IN_USE, by_kind, errors_of, failures, growth, plot, table
from benchmarks.texts import standard_library, token_windows
from vllm_fox.cli.metrics import Sample, sample_of, view

if TYPE_CHECKING:
    from local_server import Checkpoint, Server

TEXT_CONTEXTS = 16
"""Contexts of text that prompts are cut out of."""
GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
"""Environment of a server that gives memory back when it frees it, so that what grows is what it keeps.

Otherwise glibc's malloc keeps the holes that tensors of ever other sizes leave, and oneDNN, which multiplies
matrices on a CPU, the code for each of the last 1,024 shapes.
"""
IDLE_S, ANSWER_S = 60.0, 600.0
"""Seconds that the server may take to be idle after the last request, and to answer one."""
SHOWN = (
    "requests_running",
    "requests_waiting",
    "preemptions_total",
    "kv_usage",
    "pages_live",
    "pages_cached",
    "report_lag_steps",
)


class Watch:
    """Samples of a server while it works: what its /metrics say, and the memory of its processes."""

    def __init__(self, server: Server, load: Load) -> None:
        self.samples: list[dict[str, Any]] = []
        self.first: Sample | None = None
        self.last: Sample | None = None
        self._server, self._load = server, load

    async def run(self, every: float) -> None:
        """Take a sample every so many seconds, until this is cancelled. Raises ServerError if the server ends."""
        while True:
            self._server.check()
            with contextlib.suppress(OSError):  # a busy server may answer late
                self.samples.append(await self.read())
            await asyncio.sleep(every)

    async def read(self) -> dict[str, Any]:
        """A sample, whose report lag is that since the one before."""
        text = (await asyncio.to_thread(self._server.get, "/metrics")).decode()
        now = sample_of(text, self._server.url, time.monotonic())
        shown = view(now, self.last or now)
        self.first, self.last = self.first or now, now
        processes = memory(self._server.process.pid)
        total = sum(processes.values())
        taken = {"at": self._load.now, "tokens": self._load.tokens, "memory_mib": total, "processes_mib": processes}
        return taken | {name: shown[name] for name in SHOWN}

    async def idle(self) -> dict[str, Any]:
        """The server's state when nothing is in use any more, or when that has taken too long."""
        limit = time.monotonic() + IDLE_S
        while time.monotonic() < limit:
            with contextlib.suppress(OSError):  # a busy server may answer late
                state = await self.read()
                if not any([state[name] for name in IN_USE]):
                    return state
            self._server.check()
            await asyncio.sleep(0.5)
        return await self.read()


def memory(pid: int) -> dict[str, float]:
    """Resident MiB of a process and its descendants, by their names. What they share counts for each of them."""
    root, found = psutil.Process(pid), dict[str, float]()
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            name = process.name()
            found[name] = found.get(name, 0.0) + process.memory_info().rss / 2**20
    return found


async def while_watched(watch: Watch, work: Awaitable[None], every: float) -> None:
    """Finish some work, unless the server ends before."""
    tasks = [asyncio.ensure_future(work), asyncio.create_task(watch.run(every))]
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    for task in done:
        task.result()


async def ask_again(
    load: Load, answers: list[Answer], enough: asyncio.Event
) -> tuple[dict[str, Any], list[Outcome]]:
    """Ask for each answer alone, without the prefix cache, and compare, until there are enough."""
    rows, outcomes = list[dict[str, Any]](), list[Outcome]()
    for number, loaded in enumerate(answers):
        if enough.is_set():
            break
        outcome = Outcome("again", load.now)
        outcomes.append(outcome)
        try:
            alone = await load.ask(loaded.prompt, loaded.most, outcome, go_on=loaded.go_on, salt=f"alone {number}")
        except Exception as error:
            outcome.error = kind_of_error(error)
            continue
        same, worst = difference(loaded, alone)
        rows.append({"same": same, "difference": worst, "prompt": loaded.prompt, "most": loaded.most})
        rows[-1] |= {"loaded": loaded.tokens, "alone": alone.tokens}
    compared = {
        "answers": len(rows),
        "other_tokens": sum(not row["same"] for row in rows),
        "largest": max((row["difference"] for row in rows), default=0.0),
        "wrong": [row for row in rows if row["difference"] > BOUND],
    }
    return compared, outcomes


async def soak(
    server: Server, context: int, text: list[int], args: argparse.Namespace
) -> tuple[dict[str, Any], Watch, Load]:
    """The figures of a run, and what they were made of."""
    from local_server import MODEL_NAME

    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=ANSWER_S,
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False),  # this machine, whatever proxy there is
    ) as client:
        load = Load(client, MODEL_NAME, text, context, args.most, args.again, args.seed)
        watch = Watch(server, load)
        coming = arrivals(args.seed, args.rate, 60 * args.minutes, context)
        enough = asyncio.Event()

        def interrupt() -> None:
            if load.was_stopped or enough.is_set():
                raise KeyboardInterrupt
            (enough.set if load.is_over else load.stop)()

        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, interrupt)
        await while_watched(watch, load.run(coming), args.every)
        seconds = load.now
        idle = {"after the load": await watch.idle()}
        compared, again = await ask_again(load, load.remembered.kept, enough)
        idle["at the end"] = await watch.idle()
    assert watch.first is not None and watch.last is not None
    samples, asked = watch.samples, load.outcomes + again
    figures = {
        "seconds": seconds,
        "ended_early": load.was_stopped or enough.is_set(),
        "requests": len(load.outcomes),
        "not_sent": load.not_sent,
        "by_kind": by_kind(load.outcomes),
        "errors": errors_of(asked),
        "wrong": dict(Counter(one.wrong for one in asked if one.wrong)),
        "greedy_answers": load.remembered.seen,
        "compared": compared,
        "idle": idle,
        "preemptions": idle["at the end"]["preemptions_total"],
        "peak_kv_usage": max((one["kv_usage"] for one in samples), default=0.0),
        "peak_pages": max((one["pages_live"] for one in samples), default=0),
        "report_lag_steps": view(watch.last, watch.first)["report_lag_steps"],
        "memory_mib": [samples[0]["memory_mib"], samples[-1]["memory_mib"]] if samples else [0.0, 0.0],
        "growth": growth(samples),
    }
    return figures, watch, load


def text_of(model: Checkpoint) -> list[int]:
    """Tokens that prompts are cut out of."""
    files = standard_library()
    windows = token_windows(
        load_tokenizer(model.folder), files, TEXT_CONTEXTS, model.context, "the standard library"
    )
    return [token for window in windows for token in window.tolist()]


def run(args: argparse.Namespace) -> list[str]:
    """Start the server, load it, stop it; print and save what was found, and return what is wrong.

    Raises:
        SystemExit: the server did not start, or it has ended.
    """
    import local_server

    log = args.log or Path(tempfile.mkdtemp(prefix="vllm-fox-soak-"), "server.log")
    print(f"model: {args.model}\nserver log: {log}", flush=True)
    try:
        folder = args.model.resolve()
        model = local_server.Checkpoint.of(folder, local_server.read_config(folder))
        # The demo's memory is for four contexts in bfloat16.
        model = dataclasses.replace(model, kv_bytes=int(args.kv_contexts * model.kv_bytes / 2))
        text = text_of(model)
        options = ["--dtype", "float32", "--max-num-seqs", str(args.most)]
        if not args.plain_malloc:
            os.environ.update(GIVES_BACK)
        with local_server.running_server(model, log, *options) as server:
            local_server.wait_until_healthy(server, timeout=600)
            figures, watch, load = asyncio.run(soak(server, model.context, text, args))
    except (local_server.ServerError, OSError) as error:
        raise SystemExit(f"soak: {error}") from None
    wrong = failures(figures, judge_memory=not args.plain_malloc)
    print(table(figures))
    given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    more = {"options": given, "failures": wrong, "samples": watch.samples}
    save(args.json, {**figures, **more, "requests_by_time": [dataclasses.asdict(one) for one in load.outcomes]})
    if args.plot:
        plot(args.plot, watch.samples, load.outcomes)
    return wrong


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument(
        "--minutes", type=positive_float, required=True, help="how long requests arrive; Ctrl-C ends it early"
    )
    parser.add_argument("--rate", type=positive_float, default=2.0, help="arrivals per second, besides bursts")
    parser.add_argument("--seed", type=seed_number, default=0, help="of arrivals, lengths and texts")
    parser.add_argument("--kv-contexts", type=positive_float, default=1.5, help="KV memory, in longest requests")
    parser.add_argument("--most", type=positive_int, default=64, help="in flight at once; others are not sent")
    parser.add_argument("--again", type=positive_int, default=32, help="greedy answers that are compared")
    parser.add_argument("--every", type=positive_float, default=2.0, help="seconds between samples")
    parser.add_argument(
        "--plain-malloc",
        action="store_true",
        help="let the server keep freed memory as others do; it then grows for long, and is not judged",
    )
    parser.add_argument("--log", type=Path, help="where the server's log goes; a temporary folder unless given")
    parser.add_argument("--json", type=Path, default=Path("results/soak.json"))
    parser.add_argument("--plot", type=Path, help="PNG or SVG of memory, pages and latency over time")
    args = parser.parse_args()
    prepare("--json", args.json)
    if args.plot:
        prepare("--plot", args.plot)
        if importlib.util.find_spec("matplotlib") is None:
            refuse("--plot needs matplotlib: install vllm-fox[bench].")
    try:
        wrong = run(args)
    except KeyboardInterrupt:
        raise SystemExit("soak: ended by Ctrl-C, with nothing judged or saved.") from None
    if wrong:
        print("\n".join(wrong))
        raise SystemExit("verdict: FAILED")
    print("verdict: the server may be left alone, as far as this run tells")


if __name__ == "__main__":
    main()
