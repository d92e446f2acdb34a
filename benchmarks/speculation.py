"""What speculative decoding by n-gram is worth to one request whose answer repeats its prompt, with and without it.

python -m benchmarks.speculation [--models examples/fox-tiny examples/llama-evict-tiny]

The prompt is a file of Python source, and then its beginning again, as when a file is edited: what follows is
mostly in the prompt already. Each way of decoding has an engine in a process of its own. The engines of a model
stay until all of them are measured, in turn, so that a slow spell of the machine meets all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine_process import engine_processes
from benchmarks.options import Parser, integer, positive_int
from benchmarks.record import save
from vllm_fox.cpu import prepare_cpu_environment

SHIPPED = Path(__file__).parent.parent / "examples"
AGAIN = 32
"""Tokens of the file that the prompt ends with."""
TARGET = 1.6
"""Tokens per second with drafts over those without, at least."""


def _serve(name: str, pipe: Connection, model: str, method: str | None, args: argparse.Namespace) -> None:
    """In a process of its own: an engine, which answers a prompt for each number that it receives."""
    # Engines that compile the same model at the same time would write the same files.
    base = os.environ.get("VLLM_CACHE_ROOT", str(Path(tempfile.gettempdir()) / "vllm-fox-bench"))
    os.environ["VLLM_CACHE_ROOT"] = str(Path(base, f"compiled-{name}"))
    from vllm import LLM

    from benchmarks.engines import generate, greedy, source_tokens

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {}
    if gpu:
        # What vLLM wants to find free, beside the other engines.
        options["gpu_memory_utilization"] = 0.2
    if method:
        options["speculative_config"] = {
            "method": method,
            "num_speculative_tokens": args.drafts,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": args.lookup,
        }
    llm = LLM(
        model=model,
        dtype="bfloat16" if gpu else "float32",
        enforce_eager=not gpu,
        kv_cache_memory_bytes=args.kv_mib * 2**20,
        max_model_len=args.prompt_tokens + AGAIN + args.answer_tokens,
        max_num_seqs=4,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        **options,
    )

    def counted(what: str) -> int:
        counters: list[Any] = llm.get_metrics()
        return sum(int(one.value) for one in counters if one.name == f"vllm:spec_decode_num_{what}")

    def answer(number: int) -> dict[str, Any]:
        """The seconds of all tokens but the first, which the prompt is read for."""
        file = source_tokens(llm, args.prompt_tokens, seed=number)
        prompt, times = [[*file, *file[:AGAIN]]], []
        before = counted("drafts"), counted("accepted_tokens")
        for tokens in (1, args.answer_tokens):
            begun = time.perf_counter()
            (out,) = generate(llm, prompt, greedy(tokens))
            times.append(time.perf_counter() - begun)
        steps, accepted = (now - then for now, then in zip((counted("drafts"), counted("accepted_tokens")), before))
        return {
            "tokens_per_second": (args.answer_tokens - 1) / (times[1] - times[0]),
            "accepted_per_draft": accepted / steps if steps else 0.0,
            "answer": list(out.outputs[0].token_ids),
        }

    try:
        answer(0)  # kernels are compiled
        pipe.send(None)
        while (number := pipe.recv()) is not None:
            pipe.send(answer(*number))
    finally:
        llm.llm_engine.engine_core.shutdown()


def compare(model: str, methods: list[str | None], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure each way of decoding a model's answers, and hold it against the first, which is without drafts."""
    names = [f"{Path(model).name}-{method or 'without'}" for method in methods]
    each = [(name, model, method, args) for name, method in zip(names, methods, strict=True)]
    with engine_processes(_serve, each) as engines:
        rounds = [[engine.measure(number) for engine in engines] for number in range(1, args.rounds + 1)]
    rows = []
    for method, mine in zip(methods, zip(*rounds), strict=True):
        same = [
            sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one["answer"], first[0]["answer"])))
            for one, first in zip(mine, rounds)
        ]
        rows.append(
            {
                "model": Path(model).name,
                "method": method or "without",
                "tokens_per_second": statistics.median(one["tokens_per_second"] for one in mine),
                "ratio": statistics.median(
                    one["tokens_per_second"] / first[0]["tokens_per_second"] for one, first in zip(mine, rounds)
                ),
                "accepted_per_draft": statistics.mean(one["accepted_per_draft"] for one in mine),
                "same_tokens": same,
                "rounds": [one["tokens_per_second"] for one in mine],
            }
        )
    return rows


def table(rows: list[dict[str, Any]], answer_tokens: int) -> str:
    """A line for each model and way of decoding."""
    lines = [
        f"{'model':<18}{'drafts':<12}{'tokens/s':>10}{'ratio':>8}{'accepted a step':>17}{'same text':>11}{'met':>6}"
    ]
    for row in rows:
        same = f"{min(row['same_tokens'])}/{answer_tokens}"
        drafted = row["method"] != "without"
        met = ("yes" if row["ratio"] >= TARGET else "no") if drafted else ""
        lines.append(
            f"{row['model']:<18}{row['method']:<12}{row['tokens_per_second']:>10.1f}{row['ratio']:>8.2f}"
            f"{row['accepted_per_draft'] if drafted else 0:>17.2f}{same:>11}{met:>6}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=[str(SHIPPED / name) for name in ("fox-tiny", "llama-evict-tiny")]
    )
    parser.add_argument("--prompt-tokens", type=integer(AGAIN), default=1024, help="of the file")
    parser.add_argument("--answer-tokens", type=integer(2), default=512)
    parser.add_argument("--drafts", type=positive_int, default=8, help="num_speculative_tokens")
    parser.add_argument("--lookup", type=positive_int, default=5, help="prompt_lookup_max")
    parser.add_argument("--rounds", type=positive_int, default=5, help="files")
    parser.add_argument("--kv-mib", type=positive_int, default=256, help="KV memory of each engine, in MiB")
    parser.add_argument("--json", default="results/speculation.json", help="where the figures go")
    args = parser.parse_args()
    prepare_cpu_environment(kv_cache_space=False, threads=1)
    # On a GPU vLLM has one drafter under two names: with the second it schedules ahead.
    methods = [None, "ngram", *(["ngram_gpu"] if torch.cuda.is_available() else [])]
    rows = []
    for model in args.models:
        rows += compare(model, methods, args)
        save(args.json, {"options": vars(args), "rows": rows})
    print(table(rows, args.answer_tokens))
    print(f"Target: at least {TARGET} times as many tokens per second as without drafts.")


if __name__ == "__main__":
    main()
