"""Ours beside vLLM's dense models of the same size on a CPU: FoX, sparse GPT-2 (DCP) and a Llama that evicts.

    python -m benchmarks.cpu
    python -m benchmarks.cpu --pairs fox --dtypes float32 --contexts 1024

All have 4 layers, hidden size 256 and random weights. The Llama evicts seven of eight tokens behind a window of
256. The two models of a pair have an engine each, in a process of its own; both stay until the pair is done and are
measured in turn, so that a slow spell of the machine meets both.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.checkpoint import (
    Geometry,
    llama_config,
    ready,
    write_fox,
    write_gpt2,
    write_llama,
    write_sparse_gpt2,
)
from benchmarks.engine_process import engine_processes
from benchmarks.eviction import evict
from benchmarks.options import Parser, integer, positive_int
from benchmarks.record import save
from vllm_fox.cpu import prepare_cpu_environment

SIZES = Geometry(layers=4, hidden=256, heads=8, vocab=4096)

WINDOW, KEPT = 256, 1 / 8
"""Of the Llama that evicts: tokens of its window, and the share of the tokens behind it that are kept."""


def write_evicting_llama(folder: Path, geometry: Geometry) -> None:
    """config.json and model.safetensors."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(geometry)).bfloat16().save_pretrained(folder)
    evict(folder, folder, WINDOW, KEPT)


PAIRS: dict[str, dict[str, Callable[[Path, Geometry], None]]] = {
    "fox": {"FoX": write_fox, "Llama": write_llama},
    "dcp": {"DCP": write_sparse_gpt2, "GPT-2": write_gpt2},
    "evicting": {"evicting": write_evicting_llama, "Llama": write_llama},
}
"""Ours and the dense one of each pair, and what writes them."""

KV_BYTES = 2 * 2**30
MAX_ROWS = 8


def _serve(name: str, pipe: Connection, model: str, dtype: Any, longest: int, eager: bool) -> None:
    prepare_cpu_environment(kv_cache_space=False)
    from vllm import LLM

    llm = LLM(
        model=model,
        load_format="auto" if (Path(model) / "model.safetensors").exists() else "dummy",
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=longest,
        max_num_seqs=MAX_ROWS,
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        seed=0,
    )
    try:
        # What a step of each kind prepares once is prepared before anything is measured.
        for requests in (1, MAX_ROWS):
            _measure(llm, longest, 64, requests, 8)
        pipe.send(None)
        while (job := pipe.recv()) is not None:
            pipe.send(_measure(llm, longest, *job))
    finally:
        llm.llm_engine.engine_core.shutdown()


def _measure(llm: Any, longest: int, context: int, requests: int, answer: int) -> dict[str, Any]:
    """Prompts of ``context`` tokens, or as long as the answers leave room for, sent at once."""
    from vllm import SamplingParams

    engine, rng = llm.llm_engine, random.Random(context)
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
    length = min(context, longest - answer)
    begin = time.perf_counter()
    for number in range(requests):
        prompt = [rng.randrange(SIZES.vocab) for _ in range(length)]
        engine.add_request(f"{begin}-{number}", {"prompt_token_ids": prompt}, params)
    answering: set[str] = set()
    first = last = 0.0
    steps: list[float] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        if not outputs:
            continue
        all_answered = len(answering) == requests
        answering.update(output.request_id for output in outputs)
        if len(answering) == requests and not first:
            first = now - begin
        # A step that answers all requests, after another such step.
        if all_answered and len(outputs) == requests:
            steps.append(now - last)
        last = now
    step = statistics.median(steps)
    return {
        "context": context,
        "requests": requests,
        "ms": 1e3 * step,
        "tokens_per_second": requests / step,
        "prompt_tokens_per_second": requests * length / first,
    }


def report(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print medians of every setting, and ratios: medians too, of what two neighbouring runs give."""
    heads = (
        "model",
        "dtype",
        "context",
        "requests",
        "ms a step",
        "tokens/s",
        "of dense",
        "prompt tokens/s",
        "of dense",
    )
    print("".join(f"{head:>17}" for head in heads))
    table = []
    settings = dict.fromkeys((row["pair"], row["dtype"], row["context"], row["requests"]) for row in rows)
    for setting in settings:
        pair, dtype, context, requests = setting
        own, dense = PAIRS[pair]
        mine, theirs = (
            [
                row
                for row in rows
                if (row["pair"], row["dtype"], row["context"], row["requests"]) == setting and row["model"] == name
            ]
            for name in (own, dense)
        )
        for name, found in ((own, mine), (dense, theirs)):
            cells: dict[str, Any] = {"model": name, "dtype": dtype, "context": context, "requests": requests}
            for key in ("ms", "tokens_per_second", "prompt_tokens_per_second"):
                cells[key] = statistics.median(row[key] for row in found)
            for key in ("tokens_per_second", "prompt_tokens_per_second"):
                cells[f"{key}_of_dense"] = statistics.median(
                    a[key] / b[key] for a, b in zip(found, theirs, strict=True)
                )
            table.append(cells)
            print(
                f"{name:>17}{dtype:>17}{context:>17,}{requests:>17}{cells['ms']:>17.2f}"
                f"{cells['tokens_per_second']:>17,.0f}{cells['tokens_per_second_of_dense']:>16.2f}x"
                f"{cells['prompt_tokens_per_second']:>17,.0f}{cells['prompt_tokens_per_second_of_dense']:>16.2f}x",
                flush=True,
            )
    return table


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", choices=[*PAIRS], nargs="+", default=[*PAIRS])
    parser.add_argument("--dtypes", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--contexts", type=integer(2), nargs="+", default=[1024, 8192], help="tokens of a prompt")
    parser.add_argument("--answer", type=integer(8), default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--enforce-eager", action="store_true", help="without torch.compile, as in the demo")
    parser.add_argument("--json", default="results/cpu.json")
    args = parser.parse_args()
    longest = max(args.contexts) + args.answer
    sizes = replace(SIZES, max_positions=longest)
    folder = Path(tempfile.gettempdir()) / "vllm-fox-bench"
    rows: list[dict[str, Any]] = []
    for dtype in args.dtypes:
        for pair in args.pairs:
            models = (
                (name, ready(folder / f"{name}-{sizes.name}", write, sizes)) for name, write in PAIRS[pair].items()
            )
            each = ((name, str(model), dtype, longest, args.enforce_eager) for name, model in models)
            with engine_processes(_serve, each) as engines:
                for _ in range(args.rounds):
                    for context in args.contexts:
                        for requests in (1, MAX_ROWS):
                            for engine in engines:
                                row = engine.measure(context, requests, args.answer)
                                rows.append({"pair": pair, "model": engine.name, "dtype": dtype} | row)
                                print(rows[-1], file=sys.stderr, flush=True)
            # After every pair: a run that is cut short has said what it found.
            machine = {"cores": psutil.cpu_count(), "load": psutil.getloadavg(), "options": vars(args)}
            save(args.json, machine | {"sizes": vars(sizes), "table": report(rows), "rows": rows})


if __name__ == "__main__":
    main()
