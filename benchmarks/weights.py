"""Time a token with quantised weights and with adapters: of a FoX (Pro), and of vLLM's Llama of its size.

    python -m benchmarks.weights --json results/weights.json
    python -m benchmarks.weights --systems fox fox-fp8        # some of them
    python -m benchmarks.weights --report results/weights.json

Each system has an engine in a process of its own; all stay until the end and are measured in turn. It needs a GPU.
Weights are random, with the sizes of the published 760M models. The parts:

- alone: one request.
- eight: eight requests at once, without adapters.
- adapters: eight requests at once, each with an adapter of its own of all projections, where the engine has them.

A token's time is what an answer takes longer than its first token, shared out to the others: the median of several
answers. After every part all that is known so far is saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkpoint import (
    STD,
    Geometry,
    add_geometry_options,
    fox_config,
    geometry_of,
    llama_intermediate,
    ready,
    write_fox,
    write_llama,
)
from benchmarks.engine_process import engine_processes
from benchmarks.options import Parser, integer, positive_float, positive_int, refuse
from benchmarks.record import save, saved
from vllm_fox.families.fox.architecture import Architecture, expected_weights, may_be_quantised

ADAPTERS = 8
KINDS: dict[str, dict[str, Any]] = {
    "": {},
    "-fp8": {"quantization": "fp8"},
    "-adapters": {"enable_lora": True, "max_loras": ADAPTERS},
}
SYSTEMS = {f"{model}{kind}": options for model in ("fox", "llama") for kind, options in KINDS.items()}
"""Options of the engines, besides those of all."""
PARTS = {"alone": (1, False), "eight": (8, False), "adapters": (ADAPTERS, True)}
"""Requests at once, and whether each has an adapter."""


def projections(model: str, geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what an adapter changes."""
    if model == "fox":
        weights = expected_weights(Architecture.from_config(fox_config(geometry)))
        return {name.removesuffix(".weight"): shape for name, shape in weights.items() if may_be_quantised(name)}
    hidden, inner = geometry.hidden, llama_intermediate(geometry)
    layer = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    layer |= {f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")} | {"mlp.down_proj": (hidden, inner)}
    return {f"model.layers.{n}.{name}": shape for n in range(geometry.layers) for name, shape in layer.items()}


def write_adapter(folder: Path, model: str, geometry: Geometry, rank: int) -> None:
    """Save a random adapter of all projections as PEFT does."""
    from safetensors.torch import save_file

    tensors = {}
    for name, (rows, columns) in projections(model, geometry).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, dtype=torch.bfloat16) * STD
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, dtype=torch.bfloat16) * STD
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.rpartition(".")[2] for name in projections(model, geometry)})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# An engine's process.


def _serve(name: str, pipe: Connection, model: str, args: argparse.Namespace) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    kind, geometry = name.split("-")[0], geometry_of(args)
    options = dict(SYSTEMS[name])
    adapters: list[Any] = []
    with tempfile.TemporaryDirectory() as scratch:
        if "enable_lora" in options:
            options["max_lora_rank"] = args.rank
            for n in range(1, ADAPTERS + 1):
                write_adapter(Path(scratch, str(n)), kind, geometry, args.rank)
                adapters.append(LoRARequest(str(n), n, str(Path(scratch, str(n)))))
        llm = LLM(
            model=model,
            load_format="dummy" if kind == "llama" else "auto",
            dtype="bfloat16",
            kv_cache_memory_bytes=int(args.kv_gib * 2**30),
            gpu_memory_utilization=0.2,  # what vLLM wants to find free, not what it takes
            max_model_len=args.prompt + args.answer,
            max_num_seqs=max(requests for requests, _ in PARTS.values()),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            seed=0,
            **options,
        )

        def seconds(requests: int, tokens: int, with_adapters: bool) -> float:
            params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, detokenize=False)
            prompts: list[Any] = [
                {"prompt_token_ids": [(7 * n + 11 * r) % geometry.vocab for n in range(args.prompt)]}
                for r in range(requests)
            ]
            begin = time.perf_counter()
            llm.generate(
                prompts, params, lora_request=adapters[:requests] if with_adapters else None, use_tqdm=False
            )
            return time.perf_counter() - begin

        pipe.send(None)
        while (job := pipe.recv()) is not None:
            requests, with_adapters = PARTS[job[0]]
            seconds(requests, args.answer, with_adapters)  # graphs and adapters are there now
            times = [
                (seconds(requests, args.answer, with_adapters) - seconds(requests, 1, with_adapters))
                / (args.answer - 1)
                for _ in range(args.repeats)
            ]
            pipe.send({"token_ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times)})


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all systems; saves after each part."""
    if not torch.cuda.is_available():
        refuse("There is no GPU here, and vLLM's CPU build has neither of what is measured.")
    geometry, models = geometry_of(args), Path(args.models)
    write = {"fox": write_fox, "llama": write_llama}
    options = {name: getattr(args, name) for name in ("prompt", "answer", "rank", "repeats")}
    figures: dict[str, Any] = {
        "options": options | {"geometry": geometry.name},
        "systems": {name: {} for name in args.systems},
    }

    def each() -> Iterator[tuple[Any, ...]]:
        for name in args.systems:
            kind = name.split("-")[0]
            yield name, str(ready(models / f"{kind}-{geometry.name}", write[kind], geometry)), args

    with engine_processes(_serve, each()) as engines:
        for part in PARTS:
            for engine in engines:
                if part != "adapters" or engine.name.endswith("adapters"):
                    figures["systems"][engine.name][part] = engine.measure(part)
                    save(args.json, figures)
            print(table(figures), flush=True)
    return figures


def table(figures: dict[str, Any]) -> str:
    """Milliseconds of a token, each beside the same model's in bfloat16 and without adapters."""
    options, systems = figures["options"], figures["systems"]
    lines = [
        f"Milliseconds of a token, {options['geometry']}, prompts of {options['prompt']:,} tokens; adapters of "
        f"rank {options['rank']}.",
        "",
        "| engine | " + " | ".join(PARTS) + " |",
        "|---|" + "---:|" * len(PARTS),
    ]
    for name, found in systems.items():
        plain = systems.get(name.split("-")[0], {})
        cells = []
        for part in PARTS:
            beside = plain.get("eight" if part == "adapters" else part)
            ratio = f" ({found[part]['token_ms'] / beside['token_ms']:.2f}x)" if part in found and beside else ""
            cells.append(f"{found[part]['token_ms']:.3f}{ratio}" if part in found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    add_geometry_options(parser)
    parser.add_argument("--prompt", type=positive_int, default=1024, help="tokens of a prompt")
    parser.add_argument("--answer", type=integer(2), default=256, help="tokens of an answer")
    parser.add_argument("--rank", type=positive_int, default=16, help="of the adapters")
    parser.add_argument("--repeats", type=positive_int, default=5, help="answers that are timed")
    parser.add_argument("--kv-gib", type=positive_float, default=4.0, help="KV memory of each engine")
    parser.add_argument("--models", default=str(Path(tempfile.gettempdir()) / "vllm-fox-bench"))
    parser.add_argument("--report", help="print a saved run again")
    parser.add_argument("--json", default="results/weights.json")
    args = parser.parse_args()
    if args.report:
        figures: Any = saved(args.report)
        if not isinstance(figures, dict) or not {"options", "systems"} <= figures.keys():
            refuse(f"{args.report} holds no run of `python -m benchmarks.weights`.")
        print(table(figures))
    else:
        compare(args)


if __name__ == "__main__":
    main()
