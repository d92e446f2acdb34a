"""A GPT-2 that drops tokens (DCP) served beside vLLM's own dense GPT-2, in the same memory: speed and KV memory.

python -m benchmarks.dcp_serving                                       # GPT-2 small's sizes, random weights
python -m benchmarks.dcp_serving --model examples/dcp-tiny --dense GPT2

Each model runs in a process of its own, on the same prompts, which fill a context but for the answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import GPT2_SMALL, KEPT, ready, write_gpt2, write_sparse_gpt2
from benchmarks.record import save

CAPTION = (
    f"GPT-2 small's sizes. DCP: random weights, with interaction biases that keep {KEPT:.0%} of the (query, "
    "earlier token) pairs. Dense: vLLM's GPT-2, random weights."
)


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One model: seconds, most requests at once and KV memory for every context and number of requests."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from benchmarks.serving import Recorder, throughput

    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"gpu_memory_utilization": args.gpu_memory_utilization} if gpu else {}
    if gpu:
        sizes = [n for n in (1, 8, 64, 256, 512, 1024, 1536, 2048) if n <= args.max_num_seqs]
        options["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    options["load_format"] = "auto" if (args.measure / "model.safetensors").exists() else "dummy"
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(args.measure),
            dtype="bfloat16" if gpu else "float32",
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
    rows = []
    try:
        for context in args.contexts:
            answer = int(context * args.answer_share)
            for requests in args.batches:
                args.prompt, args.output, args.requests = context - answer, answer, requests
                found = await throughput(engine, args)
                # Steps without a prompt.
                decodes = [seconds for seconds, read, *_ in found.pop("steps") if not read]
                decode_ms = 1e3 * statistics.median(decodes) if decodes else None
                rows.append({"context": context, "requests": requests, "decode_ms": decode_ms} | found)
                print(rows[-1], file=sys.stderr, flush=True)
    finally:
        engine.shutdown()
    return rows


def compare(args: argparse.Namespace) -> None:
    """Both models, one after the other, and a table."""
    random = args.model is None
    if random:
        folder = Path(tempfile.gettempdir()) / "vllm-fox-bench"
        args.model = ready(folder / f"sparse-gpt2-{GPT2_SMALL.name}", write_sparse_gpt2, GPT2_SMALL)
        args.dense = ready(folder / f"gpt2-{GPT2_SMALL.name}", write_gpt2, GPT2_SMALL)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, model in (("dense", args.dense), ("DCP", args.model)):
        command = [sys.executable, "-m", "benchmarks.dcp_serving", *sys.argv[1:], "--measure", str(model)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print(CAPTION if random else f"{args.model} and {args.dense}")
    speed = "output_tokens_per_second"
    heads = ("context", "requests", "answered tok/s", "of dense", "running", "of dense", "KV peak", "preempted")
    print(f"{'':<8}" + "".join(f"{head:>16}" for head in (*heads, "decode ms")))
    for dense, dcp in zip(found["dense"], found["DCP"], strict=True):
        for name, row in (("dense", dense), ("DCP", dcp)):
            cells = [f"{row['context']:,}", f"{row['requests']:,}", f"{row[speed]:,.0f}"]
            cells += [f"{row[speed] / dense[speed]:.2f}x", f"{row['peak_running']:,}"]
            cells += [f"{row['peak_running'] / dense['peak_running']:.2f}x", f"{row['peak_kv_usage']:.1%}"]
            cells += [str(row["preemptions"]), f"{row['decode_ms'] or float('nan'):.2f}"]
            print(f"{name:<8}" + "".join(f"{cell:>16}" for cell in cells))
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    save(args.json, {"caption": CAPTION if random else None, "options": options} | found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a sparse_gpt2; GPT-2 small's sizes with random weights without")
    parser.add_argument("--dense", type=Path, help="a gpt2 of the same size")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 2048], help="requests at once")
    parser.add_argument("--answer-share", type=float, default=0.75, help="of a context, the rest is prompt")
    parser.add_argument("--max-num-seqs", type=int, default=2048)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.1)
    parser.add_argument("--json", default="results/dcp_serving.json")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(max_num_batched_tokens=8192, profile=None, limit_seconds=None)  # of benchmarks.serving
    args = parser.parse_args()
    if (args.model is None) != (args.dense is None):
        parser.error("--model and --dense go together.")
    if args.measure is None:
        compare(args)
        return
    # A forked process inherits locks of threads that do not exist in it.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    print(json.dumps(asyncio.run(measure(args))))


if __name__ == "__main__":
    main()
