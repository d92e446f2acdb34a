"""A GPT-2 that drops tokens (DCP) served beside vLLM's own dense GPT-2, in the same memory: speed and KV memory.

python -m benchmarks.dcp_serving                                       # GPT-2 small's sizes, random weights
python -m benchmarks.dcp_serving --model examples/dcp-tiny --dense GPT2
python -m benchmarks.dcp_serving --profiles results/profiles           # where each engine's host spends its time

Each model has an engine in a process of its own; both stay until the end and are measured in turn, round after
round, on the same prompts, so that a slow spell of the machine meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import GPT2_SMALL, KEPT, ready, write_gpt2, write_sparse_gpt2
from benchmarks.engine_process import engine_processes
from benchmarks.engine_profile import check_py_spy
from benchmarks.options import Parser, inner_fraction, integer, positive_int, read_record, refuse
from benchmarks.record import save

CAPTION = (
    f"GPT-2 small's sizes. DCP: random weights, with interaction biases that keep {KEPT:.0%} of the (query, "
    "earlier token) pairs. Dense: vLLM's GPT-2, random weights."
)
SPEED = "output_tokens_per_second"


def _serve(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    asyncio.run(_answer_all(name, pipe, model, args))


async def _answer_all(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from benchmarks.serving import Recorder, throughput

    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        sizes = [n for n in (1, 8, 64, 256, 512, 1024, 1536, 2048) if n <= args.max_num_seqs]
        options = {
            "compilation_config": {"cudagraph_capture_sizes": sizes},
            "gpu_memory_utilization": 0.4,  # what vLLM wants to find free, not what it takes
        }
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            load_format="auto" if (Path(model) / "model.safetensors").exists() else "dummy",
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            kv_cache_memory_bytes=args.kv_bytes,
            max_model_len=max(args.contexts),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            seed=0,
            **options,
        ),
        stat_loggers=[Recorder],
    )
    try:
        pipe.send(None)
        while (job := await asyncio.to_thread(pipe.recv)) is not None:
            context, requests = job
            answer = int(context * args.answer_share)
            args.prompt, args.output, args.requests = context - answer, answer, requests
            args.profile = args.profiles and str(args.profiles / f"{name}-{context}-{requests}.folded")
            found = await throughput(engine, args)
            steps = found.pop("steps")
            for kind, seconds in (
                ("decode", [took for took, read, *_ in steps if not read]),
                ("mixed", [took for took, read, *_ in steps if read]),
            ):
                found[f"{kind}_steps"], found[f"{kind}_seconds"] = len(seconds), sum(seconds)
                found[f"{kind}_ms"] = 1e3 * statistics.median(seconds) if seconds else None
            pipe.send({"context": context, "requests": requests} | found)
    finally:
        engine.shutdown()


def positions(folder: Path) -> int:
    """The longest context of a GPT-2, sparse or not. Ends the program if the folder has none."""
    config = read_record(folder / "config.json") or {}
    found = config.get("n_positions", config.get("block_size"))
    if not isinstance(found, int):
        refuse(f"{folder} is no GPT-2: a config.json with n_positions or block_size is needed.")
    return found


def kv_bytes(dense: Path, requests: int, context: int) -> int:
    """What K and V of so many whole requests of a dense GPT-2 take, and vLLM's own block, larger on a CPU."""
    config = json.loads((dense / "config.json").read_text())
    itemsize, block = (2, 16) if torch.cuda.is_available() else (4, 128)
    return (requests * context + block) * config["n_layer"] * config["n_embd"] * 2 * itemsize


def compare(args: argparse.Namespace) -> None:
    """Both models, in turn, and a table of medians after every round."""
    random = args.model is None
    if random:
        folder = Path(tempfile.gettempdir()) / "vllm-fox-bench"
        args.model = ready(folder / f"sparse-gpt2-{GPT2_SMALL.name}", write_sparse_gpt2, GPT2_SMALL)
        args.dense = ready(folder / f"gpt2-{GPT2_SMALL.name}", write_gpt2, GPT2_SMALL)
    args.kv_bytes = kv_bytes(args.dense, args.room, max(args.contexts))
    rows: dict[str, list[dict[str, Any]]] = {"dense": [], "DCP": []}
    caption = CAPTION if random else f"{args.model} and {args.dense}"
    each = [("dense", str(args.dense), args), ("DCP", str(args.model), args)]
    with engine_processes(_serve, each) as engines:
        for done in range(1, args.rounds + 1):
            for context in args.contexts:
                for requests in args.batches:
                    for engine in engines:
                        rows[engine.name].append(engine.measure(context, requests))
                        print(engine.name, rows[engine.name][-1], file=sys.stderr, flush=True)
            # After every round: a run that is cut short has said what it found.
            report(args, caption, rows, done)


def report(args: argparse.Namespace, caption: str, rows: dict[str, list[dict[str, Any]]], rounds: int) -> None:
    """Print medians over the rounds so far, and save everything."""
    print(caption)
    print(
        f"KV memory of each: {args.kv_bytes / 2**30:.2f} GiB, {args.room} dense requests of "
        f"{max(args.contexts):,} tokens. Medians over {rounds} of {args.rounds} rounds."
    )
    heads: tuple[str, ...] = (
        "context",
        "requests",
        "tokens/s",
        "of dense",
        "running, mean",
        "of dense",
        "at most",
        "of dense",
    )
    heads += ("KV peak", "preempted", "decode ms", "mixed ms")
    print(f"{'':<8}" + "".join(f"{head:>14}" for head in heads))
    for context in args.contexts:
        for requests in args.batches:
            for name in rows:
                print(f"{name:<8}" + "".join(f"{cell:>14}" for cell in _cells(rows, name, context, requests)))
        best = {name: _best(rows[name], context) for name in rows}
        said = [f"{name} {speed:,.0f} with {requests:,} requests" for name, (speed, requests) in best.items()]
        ratio = best["DCP"][0] / best["dense"][0]
        print(f"Most tokens/s at any batch, context {context:,}: {', '.join(said)}: {ratio:.2f}x.", flush=True)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    save(args.json, {"caption": caption, "options": options} | rows)


def _cells(rows: dict[str, list[dict[str, Any]]], name: str, context: int, requests: int) -> list[str]:
    """A line of the table. Ratios are medians too, of what two neighbouring runs give."""
    mine, dense = (
        [row for row in rows[of] if (row["context"], row["requests"]) == (context, requests)]
        for of in (name, "dense")
    )

    def median(key: str) -> float:
        found = [row[key] for row in mine if row[key] is not None]
        return statistics.median(found) if found else float("nan")

    def ratio(key: str) -> str:
        return f"{statistics.median(a[key] / b[key] for a, b in zip(mine, dense, strict=True)):.2f}x"

    return [
        *(f"{context:,}", f"{requests:,}", f"{median(SPEED):,.0f}", ratio(SPEED)),
        *(f"{median('mean_running'):,.0f}", ratio("mean_running"), f"{median('peak_running'):,.0f}"),
        *(ratio("peak_running"), f"{median('peak_kv_usage'):.1%}", f"{median('preemptions'):,.0f}"),
        *(f"{median('decode_ms'):.2f}", f"{median('mixed_ms'):.2f}"),
    ]


def _best(rows: list[dict[str, Any]], context: int) -> tuple[float, int]:
    """Most tokens/s, as a median over the rounds, and with how many requests."""
    speeds: dict[int, list[float]] = {}
    for row in rows:
        if row["context"] == context:
            speeds.setdefault(row["requests"], []).append(row[SPEED])
    return max((statistics.median(found), requests) for requests, found in speeds.items())


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a sparse_gpt2; GPT-2 small's sizes with random weights without")
    parser.add_argument("--dense", type=Path, help="a gpt2 of the same size")
    parser.add_argument("--contexts", type=integer(2), nargs="+", default=[1024])
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[32, 176], help="requests at once")
    parser.add_argument("--answer-share", type=inner_fraction, default=0.75, help="of a context; the rest: prompt")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--max-num-seqs", type=positive_int, default=512)
    parser.add_argument(
        "--room",
        type=positive_int,
        default=32,
        help="KV memory of each engine, in dense requests of the longest context",
    )
    parser.add_argument("--profiles", type=Path, help="folder for py-spy's stacks; sampling slows the engines")
    parser.add_argument("--json", default="results/dcp_serving.json")
    parser.set_defaults(max_num_batched_tokens=8192, limit_seconds=None)  # of benchmarks.serving
    args = parser.parse_args()
    if (args.model is None) != (args.dense is None):
        parser.error("--model and --dense go together.")
    if int(min(args.contexts) * args.answer_share) == 0:
        parser.error(f"--answer-share is {args.answer_share}: of --contexts {min(args.contexts)} that is no token.")
    models = [folder for folder in (args.model, args.dense) if folder is not None]
    most = min([GPT2_SMALL.max_positions] if not models else map(positions, models))
    if max(args.contexts) > most:
        parser.error(f"--contexts is {max(args.contexts)}: it must be at most {most}, the positions of the models.")
    if args.profiles is not None:
        check_py_spy()
        args.profiles.mkdir(parents=True, exist_ok=True)
    compare(args)


if __name__ == "__main__":
    main()
