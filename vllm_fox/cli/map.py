"""``vllm-fox map``: what a model forgets of a text, as a page for a browser."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import WRONG, CommandError
from .options import Json, Model, choice, whole

if TYPE_CHECKING:
    from vllm_fox.maps.collect import Progress

MAX_TOKENS = 4096
"""Tokens of a text that are read unless another number is given."""


def map(
    model: Model,
    text: Annotated[
        str,
        typer.Argument(help="A text file in UTF-8, or - for standard input.", metavar="TEXT", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")] = Path("map.html"),
    source: Annotated[
        str,
        typer.Option(
            "--from",
            parser=choice("--from", "transformers", "engine"),
            help="transformers, or engine: vLLM's pages, in this process. Both give the same map.",
            metavar="SOURCE",
        ),
    ] = "transformers",
    max_tokens: Annotated[
        int,
        typer.Option(
            parser=whole("--max-tokens", 1), help="Read no more than so many tokens of the text.", metavar="N"
        ),
    ] = MAX_TOKENS,
    page_size: Annotated[
        str | None,
        typer.Option(
            parser=choice("--page-size", "16", "32", "64", "128", "256"),
            help="Tokens of a page, as it will be served: 16, 32, 64, 128 or 256. The family's own unless given.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            parser=choice("--dtype", "bfloat16", "float16", "float32"),
            help="bfloat16, float16 or float32. The checkpoint's unless given.",
            metavar="DTYPE",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page that shows what a model forgets of a text.

    It shows which earlier tokens each head still sees, and from a token's side which heads still see it. The page
    is one HTML file that needs no network.
    """
    from .locate import folder_of

    folder = folder_of(model)
    if output.is_dir() or not output.parent.is_dir():
        raise CommandError(f"--output is {output}: give a file in a folder that exists.")
    content = _read(text)
    _check(folder)
    _prepare(source)
    from vllm_fox.maps.collect import collect
    from vllm_fox.maps.figures import summary
    from vllm_fox.maps.write import write

    try:
        with _progress() as progress:
            record = collect(
                folder,
                content,
                name=model,
                source=source,
                max_tokens=max_tokens,
                page_size=None if page_size is None else int(page_size),
                dtype=dtype,
                progress=progress,
            )
        size = write(record, output)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(" ".join(str(error).split()), WRONG) from None
    found = {"output": str(output), "bytes": size, **summary(record)}
    print(json.dumps(found, indent=2)) if as_json else _show(found)


def _read(text: str) -> str:
    """The text that was asked for."""
    try:
        raw = sys.stdin.buffer.read() if text == "-" else Path(text).read_bytes()
        return raw.decode()
    except UnicodeDecodeError:
        raise CommandError(f"TEXT is {text}, which is no text in UTF-8: give another file.") from None
    except OSError as error:
        raise CommandError(f"TEXT is {text}, which cannot be read ({error.strerror}): give a text file.") from None


def _check(folder: Path) -> None:
    """Look at a checkpoint's files before anything heavy is imported."""
    from vllm_fox.checkpoint_files import damaged_files, missing_files, read_config

    try:
        read_config(folder)
        problems = [*missing_files(folder), *damaged_files(folder)]
    except (OSError, ValueError) as error:
        problems = [str(error)]
    if problems:
        raise CommandError(problems[0], WRONG)


def _prepare(source: str) -> None:
    """Set what torch, transformers and vLLM look at when they are imported."""
    from vllm_fox.cpu import prepare_cpu_environment

    # What they say on the way goes to standard error, and only if it is an error.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if source == "engine":
        # Only an engine in this process can be looked into.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        prepare_cpu_environment()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        # Until the first tokens have been read, the bar only shows that something is going on.
        task = bar.add_task("Loading the model and reading the text", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(found: dict[str, Any]) -> None:
    read = f"{found['tokens']:,} tokens"
    if found["text_tokens"] > found["tokens"]:
        read = f"the first {found['tokens']:,} of {found['text_tokens']:,} tokens"
    print(f"{found['model']} ({found['family']}) has read {read}, from {found['source']}.")
    print(
        f"{found['given_back_at_end']:.0%} of the KV cache is given back at the end of the text, and "
        f"{found['given_back']:.0%} on average over it."
    )
    unit = "heads" if found["streams"] > found["layers"] else "layers"
    kinds = [f"{count} {kind}" for kind, count in found["kinds"].items() if count]
    print(f"Of {found['streams']:,} {unit}: {', '.join(kinds)}.")
    tokens = [repr(one["token"]) for one in found["dropped_first"][:8]]
    if tokens:
        print(f"Dropped first: {', '.join(tokens)}.")
    print(f"Written: {found['output']} ({found['bytes'] / 1e3:,.0f} kB). Open it in a browser.")
