"""``vllm-fox inspect``: what a model's requests hold, without a GPU or an engine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .errors import WRONG, CommandError
from .options import Dtype, Json, MaxModelLen, Memory, Model, Tokens
from .sizes import size

if TYPE_CHECKING:
    from .capacity import Capacity
    from .facts import Facts, Head

LENGTHS = [2048, 16384, 131072]
"""Tokens of the requests that are looked at unless others are given."""


def inspect(
    model: Model,
    tokens: Tokens = None,
    memory: Memory = None,
    dtype: Dtype = None,
    max_model_len: MaxModelLen = None,
    as_json: Json = False,
) -> None:
    """Say what a model is, what it promises, and how much KV memory its requests hold.

    It reads config.json and the weights; no GPU and no engine is needed. Dense is what a request would hold if
    nothing were forgotten. Pruned is said only where the weights prove it. Requests of 2048, 16384 and 131072
    tokens are looked at unless --tokens says others.
    """
    from .locate import folder_of

    folder = folder_of(model)
    from .facts import facts_of

    try:
        facts = facts_of(folder, dtype, max_model_len)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), WRONG) from None
    found = as_dict(model, facts, tokens or LENGTHS, memory)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _show(found, facts)


def as_dict(model: str, facts: Facts, tokens: list[int], memory: float | None) -> dict[str, Any]:
    """Return what the command found out, under the keys that docs/command_line.md lists."""
    from dataclasses import asdict

    from .capacity import RESERVE_GIB, UTILIZATION, Capacity

    capacity = Capacity(facts, memory) if memory is not None else None
    if capacity is not None and capacity.kv_bytes <= 0:
        weights = (facts.weights_bytes or 0) / 2**30
        raise CommandError(
            f"--memory is {memory:g}: {UTILIZATION:g} of it (as vLLM uses) less {RESERVE_GIB:g} GiB for "
            f"activations leaves nothing beside {weights:.2f} GiB of weights; give more."
        )
    known = {name: value for name, value in asdict(facts).items() if name not in ("windows", "page_bytes_on")}
    return {
        "model": model,
        **known,
        "requests": [_request(facts, length, capacity) for length in tokens],
        "memory": None
        if capacity is None
        else {
            "gib": memory,
            "utilization": UTILIZATION,
            "reserve_gib": RESERVE_GIB,
            "kv_bytes": capacity.kv_bytes,
        },
    }


def _request(facts: Facts, tokens: int, capacity: Capacity | None) -> dict[str, Any]:
    """One length: the bytes that a request holds, and how many such requests fit."""
    dense, pruned = facts.dense_pages(tokens), facts.pruned_pages(tokens)
    least = capacity.pruned_at_least(tokens) if capacity is not None else None
    return {
        "tokens": tokens,
        "dense_bytes": dense * facts.page_bytes,
        "pruned_bytes_at_most": None if pruned is None else pruned * facts.page_bytes,
        "dense_fit": None if capacity is None else capacity.dense(tokens).requests,
        "pruned_fit_at_least": None if least is None else least.requests,
    }


def _show(found: dict[str, Any], facts: Facts) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=160)

    def say(text: str) -> None:
        console.print(text, markup=False)

    other = "a model of vLLM's own" if facts.promise == "nothing" else "a decoder with DMS as it was published"
    say(f"{found['model']}: {facts.family or other} (model_type {facts.model_type})")
    say(
        f"{facts.layers} layers, {facts.query_heads} query heads and {facts.kv_heads} KV heads of "
        f"{facts.head_size}, in {facts.dtype}; longest context {facts.longest_context:,} tokens"
    )
    weights = "not in the folder" if facts.weights_bytes is None else size(facts.weights_bytes)
    page = f"A page is {facts.page_size} tokens of a stream, {size(facts.page_bytes)}"
    say(f"Weights: {weights}. {page}; {facts.streams} streams.")
    say("")
    say(facts.promised)
    if facts.heads:
        console.print(_table_of_heads(facts.heads, facts.longest_context, Table))
    table = Table(box=None, pad_edge=False, header_style="")
    for name in ("tokens", "dense", "pruned"):
        table.add_column(name, justify="right")
    fits = found["memory"] is not None
    if fits:
        table.add_column("dense fit", justify="right")
        table.add_column("pruned fit", justify="right")
    for row in found["requests"]:
        pruned = row["pruned_bytes_at_most"]
        cells = [
            f"{row['tokens']:,}",
            size(row["dense_bytes"]),
            "not known" if pruned is None else f"at most {size(pruned)}",
        ]
        if pruned == row["dense_bytes"]:
            cells[2] = "as dense"
        if fits:
            least = None if pruned == row["dense_bytes"] else row["pruned_fit_at_least"]
            cells += [f"{row['dense_fit']:,}", "" if least is None else f"at least {least:,}"]
        table.add_row(*cells)
    say("")
    say("KV memory of one request:")
    console.print(table)
    say("")
    say(facts.pruned)
    if fits:
        memory = found["memory"]
        say(
            f"Fit: into {size(memory['kv_bytes'])} of KV memory, which is {memory['utilization']:g} of "
            f"{memory['gib']:g} GiB (vLLM's default) less the weights and {memory['reserve_gib']:g} GiB for "
            "activations and CUDA graphs, which vLLM measures when it starts."
        )
    longest = max(row["tokens"] for row in found["requests"])
    if longest > facts.longest_context:
        say(f"{longest:,} tokens are more than the longest context assumed here: --max-model-len says another.")
    for note in facts.notes:
        say(note)


def _table_of_heads(heads: list[Head], longest: int, table_class: Any) -> Any:
    """A line for each layer: the range of its heads."""
    table = table_class(box=None, pad_edge=False, header_style="")
    for name in ("layer", "logit bound", "threshold", "window in tokens, at most"):
        table.add_column(name, justify="right")
    for layer in sorted({head.layer for head in heads}):
        own = [head for head in heads if head.layer == layer]
        windows = [head.window_at_most for head in own if head.window_at_most is not None]
        shown = _range(windows, ",.0f") if windows else ""
        never = sum(head.window_at_least >= longest for head in own)
        follow = len(own) - len(windows) - never
        for count, what in ((follow, "follow the text"), (never, "never forget")):
            if count:
                shown = "; ".join(filter(None, (shown, f"{count} of {len(own)} heads {what}")))
        table.add_row(
            str(layer),
            _range([head.logit_bound for head in own], ".1f"),
            _range([head.threshold for head in own if head.threshold is not None], ".1f"),
            shown,
        )
    return table


def _range(values: list[Any], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"
