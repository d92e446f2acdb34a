#!/usr/bin/env python3
"""Answer every prompt of a folder with several engines on a Ray cluster (Ray Data).

    python examples/ray_batch.py PROMPTS ANSWERS --model examples/fox-tiny --replicas 2

PROMPTS holds .txt files, a prompt each, and .jsonl files with {"prompt": ...} on every line. ANSWERS gets part
files (--format jsonl or parquet) with the columns id, prompt_tokens, answer, answer_tokens and error. A part is
complete or not there at all, so the run can be interrupted at any time; the same command goes on where it stopped,
and asks again what ended in an error. If an engine or its machine dies, Ray starts another and asks its prompts
again.

On one machine nothing else is needed. On a cluster run it on any node (`ray job submit`, or RAY_ADDRESS); the model
and both folders must be at the same path on all nodes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

FORMATS = ("jsonl", "parquet")


class BatchError(Exception):
    """Something the user can mend; shown without a traceback."""


# Prompts and answers on disk.


def read_prompts(folder: Path) -> Iterator[dict[str, str]]:
    """id and prompt; ids are file names in the folder, with the line in a .jsonl file."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".txt":
            yield {"id": name, "prompt": path.read_text(encoding="utf-8")}
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip():
                    yield {"id": f"{name}:{number}", "prompt": _prompt_of(line, f"{path}:{number}")}


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise BatchError(f'{where}: expected {{"prompt": "text"}}, found {line[:80]!r}.')
    return prompt


def read_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all part files."""
    for path in sorted(folder.glob("part-*.jsonl")):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
    for path in sorted(folder.glob("part-*.parquet")):
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()


def write_part(folder: Path, rows: list[dict[str, Any]], form: str) -> None:
    """A new part file; it appears complete or not at all."""
    path = folder / f"part-{time.time_ns()}-{uuid.uuid4().hex[:8]}.{form}"
    unfinished = folder / f".{path.name}"
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished)
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        unfinished.write_text(lines, encoding="utf-8")
    unfinished.rename(path)


def remember_run(folder: Path, settings: dict[str, Any]) -> None:
    """Answers of one folder all come from the same model and parameters."""
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1))
    elif (before := json.loads(path.read_text())) != settings:
        differ = [f"{key} was {before.get(key)!r}, now {settings[key]!r}" for key in settings]
        differ = [text for key, text in zip(settings, differ) if before.get(key) != settings[key]]
        raise BatchError(f"{folder} holds answers of another run: {'; '.join(differ)}. Choose a new folder.")


# The pipeline.


def answers(rows: list[dict[str, str]], args: argparse.Namespace) -> Iterable[list[dict[str, Any]]]:
    """Ask all prompts; blocks of answered rows as they come, in any order."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init(log_to_driver=args.verbose, logging_level=logging.INFO if args.verbose else logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = args.verbose
    if not args.verbose:
        logging.disable(logging.WARNING)
    workers = args.tensor_parallel_size * args.pipeline_parallel_size
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0
    unit = "GPU" if on_gpu else "CPU"
    if ray.cluster_resources()[unit] < workers * args.replicas:
        raise BatchError(
            f"--replicas {args.replicas} of {workers} {unit}s each are more than the cluster's "
            f"{ray.cluster_resources()[unit]:.0f} {unit}s."
        )
    engine = {
        "tensor_parallel_size": args.tensor_parallel_size,
        "pipeline_parallel_size": args.pipeline_parallel_size,
        **args.engine_args,
    }
    if not on_gpu:
        # What vLLM's CPU build would take of a machine that others use too.
        for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
            os.environ.setdefault(name, value)
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "HF_", "OMP_"))}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=args.model,
            engine_kwargs=engine,
            concurrency=(args.replicas, args.replicas),
            batch_size=args.batch_size,
            # Not whole CPUs: the steps before and after the engine need a little of them.
            placement_group_config=None if on_gpu else {"bundle_per_worker": {"CPU": 0.8}},
            runtime_env={"env_vars": passed_on},
            should_continue_on_error=True,
            # Text goes in and comes out; the engine tokenizes.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
        ),
        preprocess=lambda row: {
            **row,
            "sampling_params": {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": 0},
        },
        postprocess=lambda row: {
            "id": row["id"],
            "prompt_tokens": int(row.get("num_input_tokens") or 0),
            "answer": row.get("generated_text") or "",
            "answer_tokens": int(row.get("num_generated_tokens") or 0),
            "error": row.get("__inference_error__") or "",
        },
        # Little work beside the engines.
        preprocess_map_kwargs={"num_cpus": 0.1},
        postprocess_map_kwargs={"num_cpus": 0.1},
    )
    blocks = -(-len(rows) // args.batch_size)
    dataset = processor(ray.data.from_items(rows, override_num_blocks=blocks))
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield block.to_pylist()


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet; the number of prompts that ended in an error."""
    from tqdm import tqdm

    if not args.prompts.is_dir():
        raise BatchError(f"{args.prompts} is not a folder: give one with .txt or .jsonl files.")
    rows = list(read_prompts(args.prompts))
    if not rows:
        raise BatchError(f"{args.prompts} has no prompts: put .txt or .jsonl files into it.")
    if Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    remember_run(
        args.answers, {"model": args.model, "max_tokens": args.max_tokens, "temperature": args.temperature}
    )
    done = {row["id"] for row in read_parts(args.answers) if not row["error"]}
    todo = [row for row in rows if row["id"] not in done]
    print(f"{len(rows)} prompts, {len(rows) - len(todo)} answered before", flush=True)
    failed: dict[str, str] = {}
    tokens, start = 0, time.monotonic()
    with tqdm(total=len(todo), unit="prompt", disable=not todo) as bar:
        for block in answers(todo, args) if todo else ():
            write_part(args.answers, block, args.format)
            failed |= {row["id"]: row["error"] for row in block if row["error"]}
            tokens += sum(row["answer_tokens"] for row in block)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
            bar.update(len(block))
    for name, error in list(failed.items())[:10]:
        print(f"{name}: {error.splitlines()[0]}", file=sys.stderr)
    print(f"{len(todo) - len(failed)} answered now, {len(failed)} failed; answers in {args.answers}")
    return len(failed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", default=str(Path(__file__).resolve().parent / "fox-tiny"))
    parser.add_argument("--replicas", type=int, default=1, help="engines")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of an engine")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=32, help="prompts handed to an engine together")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    parser.add_argument("--engine-args", type=json.loads, default={}, help="more of vLLM's engine arguments, JSON")
    parser.add_argument("--verbose", action="store_true", help="show the logs of Ray and the engines")
    try:
        sys.exit(1 if run(parser.parse_args()) else 0)
    except BatchError as error:
        sys.exit(f"ray_batch: {error}")
    except KeyboardInterrupt:
        sys.exit("ray_batch: interrupted; the same command goes on from here.")


if __name__ == "__main__":
    main()
