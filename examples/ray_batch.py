#!/usr/bin/env python3
"""Answer every prompt of a folder with several engines on a Ray cluster (Ray Data).

    python examples/ray_batch.py PROMPTS ANSWERS --model examples/fox-tiny --replicas 2

PROMPTS holds .txt files, a prompt each, and .jsonl files with {"prompt": ...} on every line, all in UTF-8. ANSWERS
gets part files (--format jsonl or parquet) with the columns id, prompt_tokens, answer, answer_tokens and error; it
may be inside PROMPTS. A part is complete or not there at all, so the run can be interrupted at any time; the same
command goes on where it stopped, and asks again what ended in an error. If an engine or its machine dies, Ray
starts another and asks its prompts again. If engines only die and answer nothing, the run ends.

With a --temperature, all requests of a run on GPUs have the same seed. On CPUs they have none, because vLLM's CPU
build fails on seeded requests whose prompts together do not fit into one step: answers differ from run to run.

On one machine nothing else is needed. On a cluster run it on any node, with the files that are beside it (`ray job
submit --working-dir examples`, or RAY_ADDRESS); the model and both folders must be at the same path on all nodes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from command_line import Parser, non_negative_float, positive_int
from ray_common import ClusterError, add_engine_options, engine_config, parse, start_ray
from whole_files import (
    Unreadable,
    files_under,
    lines_of,
    pass_over,
    printable,
    read_record,
    read_records,
    read_text,
    refusal_said,
    replacing,
    write_whole,
)

FORMATS = ("jsonl", "parquet")
RESTARTS = 1
"""How often Ray starts a dead engine again before what is left is asked anew, if anything was answered."""


class BatchError(Exception):
    """Something the user can mend; shown without a traceback."""


# Prompts and answers on disk.


def read_prompts(folder: Path, answers: Path | None = None) -> Iterator[dict[str, str]]:
    """id and prompt; ids are file names in the folder, with the line in a .jsonl file.

    Args:
        answers: a folder whose files are no prompts.

    Raises:
        Unreadable: a file is not UTF-8 text, or cannot be read.
        BatchError: a line is not as it should be.
    """
    for path in files_under(folder, answers):
        name = printable(path.relative_to(folder))
        if path.suffix == ".txt":
            yield {"id": name, "prompt": read_text(path)}
        elif path.suffix == ".jsonl":
            for number, line in enumerate(lines_of(read_text(path)), 1):
                if line.strip():
                    yield {"id": f"{name}:{number}", "prompt": _prompt_of(line, f"{path}:{number}")}


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        prompt.encode()  # JSON can have halves of characters, which are no text
    except (ValueError, KeyError, TypeError, AttributeError):
        prompt = None
    if not isinstance(prompt, str):
        raise BatchError(f'{where}: expected {{"prompt": "text"}}, found {line[:80]!r}.')
    return prompt


def digest_of(prompt: str) -> str:
    """Short text that tells prompts apart."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def read_parts(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of all part files. What is torn is named and left out."""
    for path in sorted(folder.glob("part-*.jsonl")):
        yield from read_records(path)
    for path in sorted(folder.glob("part-*.parquet")):
        import pyarrow
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowException):
            pass_over(str(path), "it is torn")


def write_part(folder: Path, rows: list[dict[str, Any]], form: str) -> None:
    """A new part file; it appears complete or not at all."""
    with replacing(folder / f"part-{time.time_ns()}-{uuid.uuid4().hex[:8]}.{form}") as unfinished:
        if form == "parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), unfinished)
        else:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            unfinished.write_bytes(lines.encode())


def check_same_run(folder: Path, settings: dict[str, Any]) -> None:
    """Answers of one folder all come from the same model and parameters. Raises BatchError if these are others."""
    before = read_record(folder / "run.json")
    if before is not None and before != settings:
        differ = [f"{key} was {before.get(key)!r}, now {value!r}" for key, value in settings.items()]
        differ = [text for key, text in zip(settings, differ) if before.get(key) != settings[key]]
        raise BatchError(f"{folder} holds answers of another run: {'; '.join(differ)}. Choose a new folder.")


# The pipeline.


def connect(args: argparse.Namespace) -> bool:
    """Start Ray, or find its cluster; whether engines get GPUs. Raises ClusterError if there are too few."""
    import ray

    on_gpu = start_ray(args, "--replicas", args.replicas)
    ray.data.DataContext.get_current().enable_progress_bars = args.verbose
    if not args.verbose:
        logging.disable(logging.WARNING)
    return on_gpu


def answers(rows: list[dict[str, str]], args: argparse.Namespace, on_gpu: bool) -> Iterable[list[dict[str, Any]]]:
    """Ask all prompts; blocks of answered rows as they come, in any order.

    Raises:
        RayError: an engine cannot be started, or died more than :data:`RESTARTS` times.
    """
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature}
    if on_gpu:
        sampling["seed"] = 0
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=args.model,
            concurrency=(args.replicas, args.replicas),
            batch_size=args.batch_size,
            should_continue_on_error=True,
            # Text goes in and comes out; the engine tokenizes.
            chat_template_stage=False,
            tokenize_stage=False,
            detokenize_stage=False,
            log_engine_metrics=False,
            **engine_config(args, on_gpu),
        ),
        preprocess=lambda row: {**row, "sampling_params": sampling},
        postprocess=lambda row: {
            "id": row["id"],
            "prompt_digest": digest_of(row["prompt"]),
            "prompt_tokens": int(row.get("num_input_tokens") or 0),
            "answer": row.get("generated_text") or "",
            "answer_tokens": int(row.get("num_generated_tokens") or 0),
            "error": row.get("__inference_error__") or "",
        },
        # Little work beside the engines.
        preprocess_map_kwargs={"num_cpus": 0.1},
        postprocess_map_kwargs={"num_cpus": 0.1},
    )
    # Ray's own number is without end.
    processor.get_stage_by_name("vLLMEngineStage").map_batches_kwargs["max_restarts"] = RESTARTS
    blocks = -(-len(rows) // args.batch_size)
    dataset = processor(ray.data.from_items(rows, override_num_blocks=blocks))
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield block.to_pylist()


def run(args: argparse.Namespace) -> int:
    """Answer what is not answered yet; the number of prompts that ended in an error."""
    from tqdm import tqdm

    if not args.prompts.is_dir():
        raise BatchError(f"{args.prompts} is not a folder: give one with .txt or .jsonl files.")
    if args.answers.exists() and not args.answers.is_dir():
        raise BatchError(f"{args.answers} is not a folder: name one for the answers.")
    if args.answers.resolve() == args.prompts.resolve():
        raise BatchError(f"{args.answers} holds the prompts: name another folder for the answers.")
    rows = list(read_prompts(args.prompts, args.answers))
    if not rows:
        raise BatchError(f"{args.prompts} has no prompts: put .txt or .jsonl files into it.")
    settings = {
        "model": args.model,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "engine_args": args.engine_args,
    }
    check_same_run(args.answers, settings)
    done = {
        row.get("id"): row.get("prompt_digest") for row in read_parts(args.answers) if not row.get("error", True)
    }
    for row in rows:
        if done.get(row["id"]) not in (None, digest_of(row["prompt"])):
            raise BatchError(
                f"{args.answers} holds an answer to another prompt of the name {row['id']}. Choose a new folder."
            )
    todo = {row["id"]: row for row in rows if row["id"] not in done}
    asked = len(todo)
    print(f"{len(rows)} prompts, {len(rows) - asked} answered before", flush=True)
    failed: dict[str, str] = {}
    tokens, start = 0, time.monotonic()
    with unheard(args.verbose) as shown, tqdm(total=asked, unit="prompt", disable=not asked, file=shown) as bar:
        for block in until_answered(todo, args):
            args.answers.mkdir(parents=True, exist_ok=True)
            if not all(row["error"] for row in block):
                # Not before: a command that answers nothing binds no later one.
                write_whole(args.answers / "run.json", json.dumps(settings, indent=1))
            write_part(args.answers, block, args.format)
            failed |= {row["id"]: row["error"] for row in block if row["error"]}
            tokens += sum(row["answer_tokens"] for row in block)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
            bar.update(len(block))
    for name, error in list(failed.items())[:10]:
        print(f"{name}: {error.splitlines()[0]}", file=sys.stderr)
    print(f"{asked - len(failed)} answered now, {len(failed)} failed; answers in {printable(args.answers)}")
    return len(failed)


def until_answered(todo: dict[str, dict[str, str]], args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Blocks of answered rows, until ``todo``, which they are taken out of, is empty.

    Raises:
        ClusterError: the cluster has no room for the engines.
        BatchError: engines could not be started, or died again and again and answered nothing in between.
    """
    on_gpu = connect(args) if todo else False
    while todo:
        before, cause = len(todo), "no reason is known"
        try:
            for block in answers(list(todo.values()), args, on_gpu):
                yield block
                for row in block:
                    del todo[row["id"]]
        except Exception as error:  # Ray passes on whatever an engine raises
            cause = cause_of(error)
        if len(todo) == before:
            raise BatchError(
                f"the engines end before they answer any of the {before} prompts that are left, the first of which "
                f"is {next(iter(todo))}. With --verbose their logs are shown. Ray says: {cause}"
            )


def cause_of(error: Exception) -> str:
    """What an error says, on one line and without the traceback that Ray puts in front."""
    lines = [line.strip() for line in str(error).strip().splitlines() if "errors.pydantic.dev" not in line]
    last = [n for n, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception): ", line)]
    return " ".join(lines[last[-1] :] if last else lines[:1])[:400]


@contextmanager
def unheard(verbose: bool) -> Iterator[TextIO]:
    """Standard error as it was; what Ray and its native libraries print is dropped, unless ``verbose``."""
    if verbose:
        yield sys.stderr
        return
    sys.stdout.flush()
    with open(os.devnull, "w") as nothing, os.fdopen(os.dup(1), "w") as out, os.fdopen(os.dup(2), "w") as shown:
        try:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            yield shown
        finally:
            if "ray" in sys.modules:
                sys.modules["ray"].shutdown()
            sys.stdout.flush()
            os.dup2(out.fileno(), 1)
            os.dup2(shown.fileno(), 2)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--replicas", type=positive_int, default=1, help="engines")
    parser.add_argument("--max-tokens", type=positive_int, default=256)
    parser.add_argument("--temperature", type=non_negative_float, default=0.0)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="prompts handed to an engine together")
    parser.add_argument("--format", choices=FORMATS, default="jsonl")
    add_engine_options(parser)
    args = parse(parser)
    try:
        with refusal_said(args.answers, "Free some space and run the same command again."):
            sys.exit(1 if run(args) else 0)
    except (BatchError, ClusterError, Unreadable) as error:
        sys.exit(f"ray_batch: {error}")
    except KeyboardInterrupt:
        sys.exit("ray_batch: interrupted; the same command goes on from here.")


if __name__ == "__main__":
    main()
