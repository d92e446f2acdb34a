"""vLLM end to end: a FoX (Pro), the same without pruning and release, and a dense Llama, in the same memory.

Each engine runs in a process of its own; their results are joined at the end:

python -m benchmarks.serving run --system fox --profile results/fox.folded --save results/serving_fox.json
python -m benchmarks.serving run --system dense --save results/serving_dense.json
python -m benchmarks.serving run --system fox-unpruned --latency --save results/serving_fox_unpruned.json
python -m benchmarks.serving report results/serving_*.json --plot docs/serving.png

Float8 pages: --kv-cache-dtype fp8. Several GPUs: --tensor-parallel-size, --pipeline-parallel-size,
--data-parallel-size, --executor ray.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from benchmarks.checkpoint import (
    add_geometry_options,
    fox_parameters,
    geometry_of,
    llama_parameters,
    ready,
    write_fox,
    write_llama,
)
from benchmarks.engine_profile import check_py_spy, sampled, summary
from benchmarks.options import Parser, fraction, non_negative_int, positive_float, positive_int
from benchmarks.record import save, saved

CAPTION = (
    "Random weights. FoX (Pro): per-head forget-gate biases and QK-norm bounds matched to those of a trained "
    "model's heads. Dense: Llama with the same layers, hidden size and heads, and an MLP that gives it as many "
    "parameters."
)
LATENCY_OUTPUT, LATENCY_REPEATS = 128, 9
SYSTEMS = ("fox", "fox-unpruned", "dense")


class Recorder(StatLoggerBase):
    """What the scheduler of one engine said after each step."""

    engines: ClassVar[list[Recorder]] = []

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.restart()
        Recorder.engines.append(self)

    def restart(self) -> None:
        self.start = time.perf_counter()
        self.preemptions = 0
        # Seconds, prompt tokens read, tokens answered, requests running, share of the KV blocks in use.
        self.steps: list[tuple[float, int, int, int, float]] = []

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if scheduler_stats is None:
            return
        now, read, answered = time.perf_counter(), 0, 0
        if iteration_stats is not None:
            read, answered = iteration_stats.num_prompt_tokens, iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs
        running, usage = scheduler_stats.num_running_reqs, scheduler_stats.kv_cache_usage
        self.steps.append((round(now - self.start, 6), read, answered, running, round(usage, 5)))
        self.start = now

    def log_engine_initialized(self) -> None:
        """Nothing is logged."""


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options of a command that runs one system, for :func:`engine_options`."""
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "vllm-fox-bench"))
    add_geometry_options(parser)
    parser.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--max-num-seqs", type=positive_int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=positive_int, default=8192)
    parser.add_argument("--gpu-memory-utilization", type=fraction, default=0.8)
    for name in ("tensor", "pipeline", "data"):
        parser.add_argument(f"--{name}-parallel-size", type=positive_int, default=1)
    parser.add_argument("--executor", choices=["mp", "ray"])
    parser.add_argument("--save", help="JSON file for the result")


def engine_options(args: argparse.Namespace, longest: int) -> dict[str, Any]:
    """Engine arguments of the system asked for; the same flags for all."""
    size, folder = geometry_of(args), Path(args.models)
    options: dict[str, Any] = {
        "dtype": "bfloat16",
        "kv_cache_dtype": args.kv_cache_dtype,
        "max_model_len": longest,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
    }
    if args.executor == "ray" and args.data_parallel_size > 1:
        options["data_parallel_backend"] = "ray"
    elif args.executor is not None:
        options["distributed_executor_backend"] = args.executor
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = args.gpu_memory_utilization
    if args.system == "dense":
        options["load_format"] = "dummy"
        if torch.cuda.is_available():
            options["attention_backend"] = "FLASH_ATTN"
        model = ready(folder / f"llama-{size.name}", write_llama, size)
    else:
        model = ready(folder / f"fox-{size.name}", write_fox, size)
    if args.system == "fox-unpruned":
        options["additional_config"] = {"fox": {"log_pruning_tolerance": None, "release": False}}
    return {"model": str(model), **options}


def start_engine(args: argparse.Namespace, longest: int, **more: Any) -> AsyncLLM:
    """The engine of the system asked for, for requests of up to ``longest`` tokens."""
    # A forked process inherits locks of threads that do not exist in it.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_options(args, longest)), **more)


def prompt(engine: AsyncLLM, tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(10, engine.model_config.get_vocab_size(), (tokens,), generator=rng).tolist()


def greedy(output: int, kind: RequestOutputKind) -> SamplingParams:
    """Exactly ``output`` tokens."""
    return SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False, output_kind=kind)


async def ask(engine: AsyncLLM, name: str, tokens: list[int], output: int) -> None:
    """One request, from its prompt to its last token."""
    params = greedy(output, RequestOutputKind.FINAL_ONLY)
    async for _ in engine.generate({"prompt_token_ids": tokens}, params, name):
        pass


async def throughput(engine: AsyncLLM, args: argparse.Namespace) -> dict[str, Any]:
    """Total time for many long prompts, and how many ran at once."""
    length = min(args.prompt, args.max_num_batched_tokens + 8)
    warm = [prompt(engine, length, args.requests + n) for n in range(4)]
    await asyncio.gather(*(ask(engine, f"warm-up {n}", one, min(16, args.output)) for n, one in enumerate(warm)))
    prompts = [prompt(engine, args.prompt, index) for index in range(args.requests)]
    for recorder in Recorder.engines:
        recorder.restart()
    with sampled(args.profile) if args.profile else nullcontext():
        start = time.perf_counter()
        tasks = [asyncio.create_task(ask(engine, str(n), one, args.output)) for n, one in enumerate(prompts)]
        done, left = await asyncio.wait(tasks, timeout=args.limit_seconds)
        seconds = time.perf_counter() - start
    for task in done:
        task.result()
    for task in left:
        task.cancel()
    steps = [recorder.steps for recorder in Recorder.engines]
    read, answered = (sum(step[column] for one in steps for step in one) for column in (1, 2))
    # Over time: a peak that lasts until the first preemption says little.
    running = sum(sum(step[0] * step[3] for step in one) for one in steps) / seconds
    profile = {"profile": summary(args.profile)} if args.profile else {}
    return profile | {
        "complete": not left,
        "seconds": seconds,
        "finished_requests": len(done),
        "prompt_tokens": read,
        "output_tokens": answered,
        "output_tokens_per_second": answered / seconds,
        "prompt_tokens_per_second": read / seconds,
        "mean_running": running,
        "peak_running": sum(max(step[3] for step in one) for one in steps),
        "peak_kv_usage": max(step[4] for one in steps for step in one),
        "preemptions": sum(recorder.preemptions for recorder in Recorder.engines),
        "blocks": engine.vllm_config.cache_config.num_gpu_blocks,
        "block_tokens": engine.vllm_config.cache_config.block_size,
        "steps": steps[0],
    }


async def latency(engine: AsyncLLM, lengths: list[int]) -> list[dict[str, Any]]:
    """One request at a time: milliseconds to the first token, and for each token after it."""
    params = greedy(LATENCY_OUTPUT, RequestOutputKind.DELTA)
    first: dict[int, list[float]] = {length: [] for length in lengths}
    each: dict[int, list[float]] = {length: [] for length in lengths}
    # Round after round, so that a slow spell of the machine does not fall on one length.
    for repeat in range(LATENCY_REPEATS + 1):
        for length in lengths:
            times, tokens = [], prompt(engine, length, repeat)
            start = time.perf_counter()
            async for _ in engine.generate({"prompt_token_ids": tokens}, params, f"{length} {repeat}"):
                times.append(time.perf_counter())
            if repeat:  # the first warms up
                first[length].append(1e3 * (times[0] - start))
                each[length].append(1e3 * (times[-1] - times[0]) / (LATENCY_OUTPUT - 1))
    rows = [
        {
            "prompt": length,
            "first_token_ms": statistics.median(first[length]),
            "per_token_ms": statistics.median(each[length]),
            "all_first_token_ms": first[length],
            "all_per_token_ms": each[length],
        }
        for length in lengths
    ]
    for row in rows:
        print(row, flush=True)
    return rows


async def run(args: argparse.Namespace) -> dict[str, Any]:
    """Latency, then throughput, of one engine."""
    longest = max([args.prompt + args.output] + [n + LATENCY_OUTPUT for n in args.latency])
    engine = start_engine(args, longest, stat_loggers=[Recorder])
    try:
        result: dict[str, Any] = {"latency": await latency(engine, args.latency)}
        if args.requests:
            result["throughput"] = await throughput(engine, args)
        return result
    finally:
        engine.shutdown()


def label(figures: dict[str, Any]) -> str:
    """System and layout of a saved run."""
    options, parts = figures["options"], [figures["system"]]
    if (pages := options.get("kv_cache_dtype", "auto")) != "auto":  # older runs have no such option
        parts.append(pages)
    for kind in ("tensor", "pipeline", "data"):
        if (size := options[f"{kind}_parallel_size"]) > 1:
            parts.append(f"{kind[0].upper()}P={size}")
    return " ".join(parts + [options["executor"]] * (options["executor"] is not None))


def limit_seconds(figures: dict[str, Any], copy_tbs: float, tflops: float) -> tuple[float, float]:
    """Seconds in which the GPUs of a saved run could at best read what is in memory, once a step, and multiply.

    Args:
        figures: of one engine (with data parallelism only the first one's steps are saved).
        copy_tbs, tflops: TB/s of copies, and TFLOP/s of the model's matrix products, of one GPU.

    Returns:
        Seconds for reading the pages in use, K, V and gates; and for two operations a weight and token. The weights
        of the head count only for tokens that are answered.
    """
    options, total = figures["options"], figures["result"]["throughput"]
    size = geometry_of(argparse.Namespace(**options))
    fox = figures["system"] != "dense"
    number = 1 if options.get("kv_cache_dtype") == "fp8" else 2
    token = size.layers * (2 * size.hidden * number + (4 * size.heads if fox else 0))
    held = total["blocks"] * total["block_tokens"] * token
    read = held * sum(step[4] for step in total["steps"]) / (1e12 * copy_tbs)
    head = size.vocab * size.hidden
    layers = (fox_parameters(size) if fox else llama_parameters(size)) - 2 * head
    answered = total["output_tokens"]
    products = 2 * (layers * (total["prompt_tokens"] + answered) + head * answered) / (1e12 * tflops)
    gpus = options["tensor_parallel_size"] * options["pipeline_parallel_size"]
    return read / gpus, products / gpus


def report(args: argparse.Namespace) -> None:
    """Join saved results to tables."""
    found = [saved(path) for path in args.files]
    for path, one in zip(args.files, found, strict=True):
        if not isinstance(one, dict) or "result" not in one:
            raise SystemExit(f"{path} holds no run of `python -m benchmarks.serving run`.")
    latencies, totals = {}, {}
    for one in found:
        if rows := one["result"]["latency"]:
            latencies[label(one)] = {row["prompt"]: row for row in rows}
        if "throughput" in one["result"]:
            totals[label(one)] = one["result"]["throughput"]
    print(CAPTION)
    if totals:
        _throughput_table(totals)
    for name, rows in latencies.items():
        for length, row in rows.items():
            first, each = row["first_token_ms"], row["per_token_ms"]
            to, of_dense = latencies.get("dense", {}).get(length), ("", "")
            if to is not None:
                of_dense = (
                    f" ({first / to['first_token_ms']:.2f}x dense)", f" ({each / to['per_token_ms']:.2f}x dense)"
                )  # fmt: skip
            print(
                f"{name:<18}{length:>8,} tokens: first token {first:8.1f} ms{of_dense[0]}, "
                f"each after {each:.3f} ms{of_dense[1]}"
            )
    for name, total in totals.items():
        if share := total.get("profile"):
            print(
                f"{name}, of the engine's time: scheduler's side of the plugin {100 * share['scheduler']:.1f} %, "
                f"page table and reports on a worker {100 * share['worker']:.1f} %"
            )
    for one in found if args.copy_tbs else []:
        if "throughput" not in one["result"] or one["options"]["data_parallel_size"] > 1:
            continue
        read, products = limit_seconds(one, args.copy_tbs, args.tflops)
        seconds = one["result"]["throughput"]["seconds"]
        print(
            f"{label(one)}: limit {read + products:.1f} s, of which reading {read:.1f} s and products "
            f"{products:.1f} s: {100 * (read + products) / seconds:.0f} % of the run"
        )
    if args.plot:
        _plot(args.plot, totals)


def _throughput_table(total: dict[str, dict[str, Any]]) -> None:
    heads = ("seconds", "of first", "tokens/s", "of first", "running", "of first", "KV peak", "preempted")
    print(f"{'system':<18}" + "".join(f"{head:>11}" for head in heads))
    first = next(iter(total.values()))
    for name, row in total.items():
        seconds = f"{row['seconds']:.1f}" if row["complete"] else f"> {row['seconds']:.0f}"
        rate = row["output_tokens_per_second"]
        cells = [seconds, f"{row['seconds'] / first['seconds']:.2f}x", f"{rate:.0f}"]
        cells += [f"{rate / first['output_tokens_per_second']:.2f}x", str(row["peak_running"])]
        cells += [f"{row['peak_running'] / first['peak_running']:.2f}x", f"{100 * row['peak_kv_usage']:.1f} %"]
        cells.append(str(row["preemptions"]))
        print(f"{name:<18}" + "".join(f"{cell:>11}" for cell in cells))
        if not row["complete"]:
            print(f"{'':<18}stopped: {row['finished_requests']} finished, {row['output_tokens']} tokens answered")


def _plot(path: str, total: dict[str, dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    names = list(total)
    for axis, key, title in zip(axes, ("seconds", "peak_running"), ("seconds in all", "most requests at once")):
        bars = axis.barh(names, [total[name][key] for name in names])
        labels = [
            ("> " if key == "seconds" and not total[n]["complete"] else "") + f"{total[n][key]:.0f}" for n in names
        ]
        axis.bar_label(bars, labels)
        axis.set_title(title)
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"saved {path}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    add_engine_options(one)
    one.add_argument("--requests", type=non_negative_int, default=256, help="0: latency only")
    one.add_argument("--prompt", type=positive_int, default=16384)
    one.add_argument("--output", type=positive_int, default=1024)
    one.add_argument("--limit-seconds", type=positive_float, help="stop many requests then, and say what was done")
    one.add_argument("--profile", help="sample the engine's processes with py-spy, and save the folded stacks here")
    one.add_argument("--latency", type=positive_int, nargs="*", default=[1024, 16384, 65536], help="prompt lengths")
    joined = commands.add_parser("report")
    joined.add_argument("files", nargs="+")
    joined.add_argument("--plot")
    joined.add_argument("--copy-tbs", type=positive_float, help="TB/s of copies on the GPU: also print the limit")
    joined.add_argument("--tflops", type=positive_float, help="TFLOP/s of matrix products, for the limit")
    args = parser.parse_args()
    if args.command == "report":
        if (args.copy_tbs is None) != (args.tflops is None):
            joined.error("--copy-tbs and --tflops go together.")
        report(args)
        return
    geometry_of(args)
    if not args.requests and not args.latency:
        parser.error("--requests is 0 and --latency has no lengths: there is nothing to measure.")
    if args.profile:
        check_py_spy()
    result = asyncio.run(run(args))
    figures = {"system": args.system, "caption": CAPTION, "options": vars(args)}
    figures["result"] = result
    print({key: value for key, value in result.get("throughput", result).items() if key != "steps"}, flush=True)
    if args.save:
        save(args.save, figures)


if __name__ == "__main__":
    main()
