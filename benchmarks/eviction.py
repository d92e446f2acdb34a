"""Decoders that evict tokens served beside vLLM's own dense ones, in the same memory: speed, memory, first tokens.

python -m benchmarks.eviction --geometry qwen3-8b --kv-gib 16
python -m benchmarks.eviction --geometry llama-3.2-1b --systems dense dense-fp8 evicting evicting-fp8
python -m benchmarks.eviction --tiny                        # on a CPU: small sizes
python -m benchmarks.eviction --report results/eviction.json --plot docs/eviction.png

Weights are random, with the sizes of a known model, and DMS decides by a borrowed neuron. Its offset is set so that
seven of eight tokens are evicted, unless --kept says otherwise: with random weights the neuron is normally
distributed. What the engines then hold is measured, not assumed. Each system has an engine in a process of its own;
all stay until the end and are measured in turn. The parts:

- alone: one request at a time; time to the first token, and for each token after it, by length of the prompt.
- eight: eight requests at once; milliseconds of a decode step, and KV memory of a request.
- full: more requests than fit; tokens per second, and how many run at once.

After every engine and part all that is known so far is saved.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.checkpoint import STD, ready
from benchmarks.engine_process import engine_processes
from benchmarks.options import Parser, inner_fraction, integer, positive_float, positive_int, refuse
from benchmarks.record import save, saved
from vllm_fox.cpu import KV_CACHE_SPACE, prepare_cpu_environment

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

SYSTEMS = ("dense", "dense-fp8", "evicting", "evicting-fp8")
PARTS = ("alone", "eight", "full")
SCALE = 100.0
"""Of DMS's logits, as published."""
EIGHT, EIGHT_ANSWER = 8, 128
TINY: dict[str, Any] = {
    "geometry": "tiny",
    "kv_gib": 0.01,
    "window": 32,
    "lengths": [64, 256],
    "contexts": [256],
    "requests": 12,
    "limit_seconds": 20.0,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}
"""Defaults under --tiny."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder."""

    kind: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    tied: bool


GEOMETRIES = {
    "qwen3-8b": Geometry("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, False),
    "llama-3.2-1b": Geometry("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, True),
    "tiny": Geometry("qwen3", 64, 128, 2, 4, 2, 32, 512, 2048, True),
}


# Checkpoints: config.json only, for vLLM's load_format="dummy".


def write_dense(folder: Path, size: Geometry) -> None:
    """config.json of a Qwen3 or Llama."""
    from transformers import LlamaConfig, Qwen3Config

    config = (Qwen3Config if size.kind == "qwen3" else LlamaConfig)(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.max_positions,
        tie_word_embeddings=size.tied,
        dtype=torch.bfloat16,
        architectures=["Qwen3ForCausalLM" if size.kind == "qwen3" else "LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def evict(dense: Path, folder: Path, window: int, kept: float) -> None:
    """Write the config of a decoder with random weights that evicts all but a share ``kept`` behind a window.

    Args:
        dense: folder of the config of the same decoder that evicts nothing.
        folder: may be the same.
    """
    from transformers import AutoConfig

    from vllm_fox.families.evicting.convert import config_of

    sizes = AutoConfig.from_pretrained(dense)
    # Of the neuron that decides: QK-norm makes it 1.
    deviation = 1.0 if sizes.model_type == "qwen3" else STD * math.sqrt(sizes.hidden_size)
    eviction = {
        "method": "dms_borrowed_neuron",
        "window": window,
        "shift": 1,
        "scale": SCALE,
        "offset": SCALE * deviation * NormalDist().inv_cdf(kept),
    }
    config_of(dense, eviction).save_pretrained(folder)


def randomise(worker: Any) -> None:
    """Give the model of a worker random weights in place of vLLM's dummy ones, which are all nearly 0."""
    for name, weight in worker.get_model().named_parameters():
        if "norm" in name:
            weight.data.fill_(1.0)
        else:
            weight.data.normal_(std=STD)


# An engine's process.


def _serve(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # for `randomise`, between processes of this benchmark
    if not torch.cuda.is_available():
        prepare_cpu_environment(threads=1)
        os.environ[KV_CACHE_SPACE] = "1"
    asyncio.run(_answer_all(name, pipe, model, args))


async def _answer_all(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from benchmarks.serving import LATENCY_OUTPUT, Recorder

    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = 0.2  # what vLLM wants to find free, not what it takes
        if name == "dense":
            options["attention_backend"] = "FLASH_ATTN"
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=model,
            load_format="dummy",
            dtype="bfloat16",
            kv_cache_dtype="fp8" if name.endswith("fp8") else "auto",
            kv_cache_memory_bytes=int(args.kv_gib * 2**30),
            max_model_len=max(*args.contexts, max(args.lengths) + LATENCY_OUTPUT, args.contexts[0] + EIGHT_ANSWER),
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=False,
            enforce_eager=not torch.cuda.is_available(),
            seed=0,
            **options,
        ),
        stat_loggers=[Recorder],
    )
    try:
        await engine.collective_rpc(randomise)  # type: ignore[arg-type]  # a function, as LLM.collective_rpc takes it
        pipe.send(None)
        while (job := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send(await _measured(engine, args, *job))
    finally:
        engine.shutdown()


async def _measured(engine: AsyncLLM, args: argparse.Namespace, part: str, context: int) -> dict[str, Any]:
    from benchmarks.serving import latency, throughput

    if part == "alone":
        return {"lengths": await latency(engine, args.lengths)}
    options = argparse.Namespace(**vars(args), profile=None)
    if part == "eight":
        options.prompt, options.output, options.requests = context, EIGHT_ANSWER, EIGHT
    else:
        options.output = int(context * args.answer_share)
        options.prompt = context - options.output
    found = await throughput(engine, options)
    steps = found.pop("steps")
    most = found["peak_running"]
    decode = [(took, used / running) for took, read, _, running, used in steps if not read and running == most]
    found["decode_ms"] = 1e3 * statistics.median(took for took, _ in decode) if decode else None
    # What one request holds: while all answer, which is when prompts are not being read.
    held = [used for _, used in decode] or [used / running for _, _, _, running, used in steps if running]
    found["kv_bytes_per_request"] = statistics.median(held) * args.kv_gib * 2**30
    return found


# The program's process.


def models(args: argparse.Namespace) -> dict[str, Path]:
    """The folder of each system's model."""
    size, folder = GEOMETRIES[args.geometry], Path(args.models)
    dense = ready(folder / f"{args.geometry}-dense", write_dense, size)
    name = f"{args.geometry}-evicting-{args.window}-{args.kept:g}"
    evicting = ready(folder / name, lambda path, _: evict(dense, path, args.window, args.kept), size)
    return {system: dense if system.startswith("dense") else evicting for system in args.systems}


def jobs(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Parts and contexts, in the order in which they are measured."""
    for part in args.parts:
        for context in [0] if part == "alone" else args.contexts[:1] if part == "eight" else args.contexts:
            yield part, context


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All parts of all systems, saved after each."""
    folders = models(args)
    figures: dict[str, Any] = {"options": vars(args), "systems": {name: {} for name in args.systems}}
    each = [(name, str(folders[name]), args) for name in args.systems]
    with engine_processes(_serve, each) as engines:
        for part, context in jobs(args):
            for engine in engines:
                found = figures["systems"][engine.name]
                found[f"{part} {context}" if context else part] = engine.measure(part, context)
                save(args.json, figures)
            print(table(figures), flush=True)
    return figures


# What is said.


def caption(options: dict[str, Any]) -> str:
    """What was measured."""
    return (
        f"{options['geometry']}'s sizes and random weights. Evicting: DMS with a borrowed neuron and a window of "
        f"{options['window']}, whose offset evicts {1 - options['kept']:.1%} of the tokens. KV memory of each: "
        f"{options['kv_gib']:g} GiB."
    )


def table(figures: dict[str, Any]) -> str:
    """All figures so far, beside the dense model's."""
    systems, lines = figures["systems"], [caption(figures["options"])]
    dense = systems.get("dense", {})
    for part in dict.fromkeys(part for found in systems.values() for part in found):
        lines.append(f"\n{part}")
        for name, found in systems.items():
            if part in found:
                lines += _rows(name, found[part], dense.get(part))
    return "\n".join(lines)


def _rows(name: str, mine: dict[str, Any], dense: dict[str, Any] | None) -> list[str]:
    def beside(key: str, of: dict[str, Any], to: dict[str, Any] | None) -> str:
        if to is None or not of[key] or not to[key]:
            return ""
        return f" ({of[key] / to[key]:.2f}x)"

    if "lengths" in mine:
        peers = {row["prompt"]: row for row in dense["lengths"]} if dense else {}
        return [
            f"  {name:<14}{row['prompt']:>8,} tokens: first token {row['first_token_ms']:9.1f} ms"
            f"{beside('first_token_ms', row, peers.get(row['prompt']))}, each after {row['per_token_ms']:7.3f} ms"
            f"{beside('per_token_ms', row, peers.get(row['prompt']))}"
            for row in mine["lengths"]
        ]
    step = "none" if mine["decode_ms"] is None else f"{mine['decode_ms']:.2f} ms{beside('decode_ms', mine, dense)}"
    return [
        f"  {name:<14}{mine['output_tokens_per_second']:10,.0f} tokens/s"
        f"{beside('output_tokens_per_second', mine, dense)}, {mine['mean_running']:.0f} running on average"
        f"{beside('mean_running', mine, dense)}, {mine['peak_running']} at most"
        f"{beside('peak_running', mine, dense)}, "
        f"{mine['kv_bytes_per_request'] / 2**20:,.2f} MiB of KV a request"
        f"{beside('kv_bytes_per_request', mine, dense)}, decode step {step}, "
        f"{mine['preemptions']} preempted{'' if mine['complete'] else ', stopped by the time limit'}"
    ]


def plot(path: str, figures: dict[str, Any]) -> None:
    """Tokens per second and requests at once with memory full, by context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = figures["systems"]
    parts = [part for part in next(iter(systems.values())) if part.startswith("full")]
    if not parts:
        refuse("The part full has not been measured: there is nothing to draw.")
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    keys = {"output_tokens_per_second": "tokens per second", "mean_running": "requests at once, on average"}
    for axis, (key, title) in zip(axes, keys.items(), strict=True):
        for number, (name, found) in enumerate(systems.items()):
            at = [index + number / (len(systems) + 1) for index in range(len(parts))]
            bars = axis.bar(at, [found[part][key] for part in parts], 1 / (len(systems) + 1), label=name)
            axis.bar_label(bars, fmt="{:,.0f}", fontsize="x-small")
        axis.set_xticks(
            [index + 0.3 for index in range(len(parts))], [part.removeprefix("full ") for part in parts]
        )
        axis.set_xlabel("tokens of a request")
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"saved {path}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a CPU")
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen3-8b")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=["dense", "evicting"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kv-gib", type=positive_float, default=16.0, help="KV memory of each engine")
    parser.add_argument("--window", type=positive_int, default=512, help="W, in tokens")
    parser.add_argument(
        "--kept", type=inner_fraction, default=0.125, help="share of the tokens that are not evicted"
    )
    parser.add_argument(
        "--lengths", type=positive_int, nargs="+", default=[2048, 8192, 32768], help="prompts of the part alone"
    )
    parser.add_argument(
        "--contexts", type=integer(2), nargs="+", default=[8192, 32768], help="of full; the first: prompts of eight"
    )
    parser.add_argument(
        "--answer-share", type=inner_fraction, default=0.5, help="of a context of full; rest: prompt"
    )
    parser.add_argument("--requests", type=positive_int, default=256, help="of the part full")
    parser.add_argument("--limit-seconds", type=positive_float, default=90.0, help="of a measurement of full")
    parser.add_argument("--max-num-seqs", type=positive_int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=positive_int, default=8192)
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "vllm-fox-bench"))
    parser.add_argument("--report", help="print a saved run again")
    parser.add_argument("--plot", help="PNG of the part full")
    parser.add_argument("--json", default="results/eviction.json")
    first, _ = parser.parse_known_args()
    if first.tiny:
        parser.set_defaults(**TINY)
    args = parser.parse_args()
    if args.report:
        figures: Any = saved(args.report)
        if not isinstance(figures, dict) or not {"options", "systems"} <= figures.keys():
            refuse(f"{args.report} holds no run of `python -m benchmarks.eviction`.")
        print(table(figures))
    else:
        size = GEOMETRIES[args.geometry]
        longest = max(*args.contexts, max(args.lengths) + EIGHT_ANSWER, args.contexts[0] + EIGHT_ANSWER)
        if longest > size.max_positions:
            refuse(f"A request would have {longest} tokens: {args.geometry} has {size.max_positions} positions.")
        if not 0 < int(min(args.contexts) * args.answer_share) < min(args.contexts):
            parser.error(f"--answer-share {args.answer_share} of --contexts {min(args.contexts)} is no token.")
        figures = compare(args)
    if args.plot:
        plot(args.plot, figures)


if __name__ == "__main__":
    main()
