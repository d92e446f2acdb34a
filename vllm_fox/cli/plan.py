"""``vllm-fox plan``: how many requests of a model fit into GPUs at a time, and what limits them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import WRONG, CommandError
from .options import Dtype, Json, MaxModelLen, Memory, Model, Tokens, choice, number, whole
from .sizes import size

if TYPE_CHECKING:
    from .capacity import Fit
    from .facts import Facts

GPUS = {
    "A10": 22.5,
    "A100-40GB": 40.0,
    "A100-80GB": 80.0,
    "A6000": 48.0,
    "B200": 179.1,
    "H100": 79.6,
    "H200": 140.4,
    "L4": 22.5,
    "L40S": 45.0,
    "RTX4090": 24.0,
}
"""GiB of memory that nvidia-smi shows."""
LENGTHS = [2048, 8192, 32768]
"""Tokens of the requests that are planned for unless others are given."""
RANKS = [1, 2, 4, 8]
"""Tensor-parallel sizes that are looked at unless others are given, as far as the model can be served so."""


def plan(
    model: Model,
    gpu: Annotated[
        str | None,
        typer.Option(
            parser=choice("--gpu", *GPUS),
            help=f"Name of the GPUs: {', '.join(GPUS)}. Those of this machine unless given.",
            metavar="NAME",
            show_default=False,
        ),
    ] = None,
    memory: Memory = None,
    tokens: Tokens = None,
    tp: Annotated[
        list[int] | None,
        typer.Option(
            parser=whole("--tp", 1),
            help="Tensor-parallel sizes, several in a row; those of 1 2 4 8 that the model allows unless given.",
            metavar="N...",
            show_default=False,
        ),
    ] = None,
    pp: Annotated[int, typer.Option(parser=whole("--pp", 1), help="Number of pipeline stages.", metavar="N")] = 1,
    live_share: Annotated[
        float | None,
        typer.Option(
            parser=number("--live-share", 0.001, 1, "0.3"),
            help="Share of dense pages that your requests hold, as `vllm-fox top` shows it: plan with that.",
            metavar="X",
            show_default=False,
        ),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            parser=whole("--max-num-seqs", 1),
            help="As it will be served. vLLM's default for such a GPU unless given.",
            metavar="N",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    as_json: Json = False,
) -> None:
    """Say how many requests fit at a time, by their length and the number of GPUs, and what limits them.

    It reads config.json and the weights; no GPU and no engine is needed. Dense is as if nothing were forgotten.
    Pruned is said where the weights prove it, or for the live share that you have measured. Requests of 2048, 8192
    and 32768 tokens are planned for, as far as the model takes them, unless --tokens says others.
    """
    if gpu is not None and memory is not None:
        raise CommandError(f"--gpu is {gpu} and --memory is {memory:g}: give one of them.")
    from .locate import folder_of

    folder = folder_of(model)
    from .facts import facts_of, refusals

    name, gib = _gpu(gpu, memory)
    try:
        facts = facts_of(folder, dtype, max_model_len)
        refused = {ranks: refusals(facts, folder, ranks, pp) for ranks in tp or RANKS}
    except (OSError, ValueError) as error:
        raise CommandError(str(error), WRONG) from None
    allowed = [ranks for ranks, what in refused.items() if not what]
    for ranks, what in refused.items():
        if what and (tp or not allowed):
            raise CommandError(f"--tp is {ranks} and --pp is {pp}: {model} cannot be served by {what[0]}.")
    if live_share is not None and facts.promise == "nothing":
        raise CommandError(f"--live-share is {live_share:g}, and {model} drops nothing: leave it out.")
    lengths = tokens or [length for length in LENGTHS if length <= facts.longest_context] or [facts.longest_context]
    seqs = max_num_seqs or _default_seqs(name, gib)
    rows = [_row(facts, length, gib, ranks, pp, seqs, live_share) for length in lengths for ranks in allowed]
    found = {
        "model": model,
        "family": facts.family,
        "dtype": facts.dtype,
        "gpu": name,
        "memory_gib": gib,
        "pp": pp,
        "max_num_seqs": seqs,
        "longest_context": facts.longest_context,
        "live_share": live_share,
        "rows": rows,
        "notes": _notes(facts, rows, gib, pp, seqs, live_share),
    }
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def _gpu(gpu: str | None, memory: float | None) -> tuple[str | None, float]:
    """Name and GiB of the GPUs: as asked for, or this machine's."""
    if memory is not None:
        return None, memory
    if gpu is not None:
        return gpu, GPUS[gpu]
    import torch

    if not torch.cuda.is_available():
        raise CommandError(f"There is no GPU here: give --gpu with one of {', '.join(GPUS)}, or --memory in GiB.")
    return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30


def _default_seqs(name: str | None, gib: float) -> int:
    """vLLM's default for --max-num-seqs of a server."""
    small = gib < 70 or (gib < 160 and name is not None and "a100" in name.lower())
    return 256 if small else 1024


def _row(
    facts: Facts, tokens: int, gib: float, ranks: int, stages: int, seqs: int, live_share: float | None
) -> dict[str, Any]:
    """One length on GPUs of one number."""
    from .capacity import Capacity

    capacity = Capacity(facts, gib, ranks, stages, seqs)
    dense: Fit = capacity.dense(tokens)
    pruned, known = capacity.pruned_at_least(tokens), "proved"
    if live_share is not None:
        pruned, known = capacity.pruned_measured(tokens, live_share), "measured"
    return {
        "tokens": tokens,
        "tp": ranks,
        "gpus": ranks * stages,
        "kv_bytes": max(0, capacity.kv_bytes),
        "dense_fit": dense.requests,
        "dense_limit": dense.limit.value,
        "pruned_fit": None if pruned is None else pruned.requests,
        "pruned_limit": None if pruned is None else pruned.limit.value,
        "pruned_from": None if pruned is None else known,
    }


def _notes(
    facts: Facts, rows: list[dict[str, Any]], gib: float, stages: int, seqs: int, live_share: float | None
) -> list[str]:
    """What must be known to read the table."""
    from .capacity import RESERVE_GIB, UTILIZATION, Capacity

    notes = [
        f"KV memory of a GPU is {UTILIZATION:g} of {gib:.4g} GiB (vLLM's default) less its part of the weights and "
        f"{RESERVE_GIB:g} GiB for activations and CUDA graphs, which vLLM measures when it starts.",
        f"At most {seqs:,} requests run at a time unless --max-num-seqs says another number.",
    ]
    if live_share is not None:
        notes.append(
            f"Pruned is for requests that hold {live_share:.1%} of what is dense, in all layers and heads alike."
        )
    else:
        notes.append(facts.pruned)
    longest = max(row["tokens"] for row in rows)
    if longest > facts.longest_context:
        notes.append(f"{longest:,} tokens are more than the longest context: --max-model-len says another.")
    small = sorted(
        row["gpus"]
        for row in {row["gpus"]: row for row in rows}.values()
        if Capacity(facts, gib, row["tp"], stages).dense(facts.longest_context).requests < 1
    )
    if small:
        notes.append(
            f"vLLM starts only if a request of --max-model-len {facts.longest_context:,} that forgets nothing "
            f"fits, and it does not on {' or '.join(map(str, small))} of these GPUs: lower it, or take more."
        )
    return [*notes, *facts.notes]


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=160)
    name = "" if found["gpu"] is None else f" ({found['gpu']})"
    stages = "" if found["pp"] == 1 else f", in {found['pp']} pipeline stages"
    gpus = f"GPUs with {found['memory_gib']:.4g} GiB{name}"
    console.print(f"{found['model']} in {found['dtype']}, on {gpus}{stages}:", markup=False)
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("tokens", "GPUs", "KV memory of each", "dense fit", "limited by", "pruned fit", "limited by"):
        table.add_column(name, justify="right")
    sure = {"proved": "at least ", "measured": "about "}
    for row in found["rows"]:
        fit = row["pruned_fit"]
        cells = [f"{row['tokens']:,}", str(row["gpus"]), size(row["kv_bytes"])]
        cells += [f"{row['dense_fit']:,}", row["dense_limit"]]
        if fit is None:
            cells += ["not known", ""]
        else:
            cells += [f"{sure[row['pruned_from']]}{fit:,}", row["pruned_limit"]]
        table.add_row(*cells)
    console.print(table)
    console.print()
    for note in found["notes"]:
        console.print(note, markup=False)
