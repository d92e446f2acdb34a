"""``vllm-fox top``: a live view of a server that serves a model that forgets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import number
from .sizes import size

if TYPE_CHECKING:
    from rich.table import Table

View = dict[str, Any]
"""See :func:`.metrics.view`."""


def top(
    url: Annotated[
        str,
        typer.Argument(
            help="The server's address, such as http://localhost:8000.", metavar="URL", show_default=False
        ),
    ],
    interval: Annotated[
        float,
        typer.Option(parser=number("--interval", 0.1, 3600, "2"), help="Seconds between two looks.", metavar="S"),
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line with a JSON object for each interval.")
    ] = False,
) -> None:
    """Watch a running server: requests, pages, what is pruned and given back, prefix hits, tokens per second.

    It reads the server's /metrics, and ends with Ctrl-C.
    """
    views = _views(url, interval)
    try:
        if as_json:
            for view in views:
                print(json.dumps(view), flush=True)
                if once:
                    return
        elif once:
            _console().print(table_of(next(views)))
        else:
            _watch(views)
    except KeyboardInterrupt:
        return


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _views(url: str, interval: float) -> Iterator[View]:
    from .metrics import fetch, metrics_url, view

    address = metrics_url(url)
    before = fetch(address)
    while True:
        time.sleep(interval)
        now = fetch(address)
        yield view(now, before)
        before = now


def _watch(views: Iterator[View]) -> None:
    """Show every view in the place of the last one, or below it where the output is no terminal."""
    from rich.live import Live

    console = _console()
    if not console.is_terminal:
        for view in views:
            console.print(table_of(view))
        return
    first = next(views)
    with Live(table_of(first), console=console, auto_refresh=False) as live:
        live.refresh()
        for view in views:
            live.update(table_of(view), refresh=True)


def table_of(view: View) -> Table:
    """Return the lines that are shown."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False, title=view["model"], title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")

    def line(name: str, value: str, more: str = "") -> None:
        table.add_row(name, value, more)

    blocks = view["kv_blocks"]
    used = f"{view['kv_blocks_used']:,} of {blocks:,}" if blocks is not None else ""
    line("requests running", f"{view['requests_running']:,}", f"{view['requests_waiting']:,} waiting")
    line("preemptions", f"{view['preemptions_total']:,}", "since the server started")
    line("KV blocks in use", f"{view['kv_usage']:.1%}", used)
    free = "" if view["pages_free"] is None else f", {view['pages_free']:,} free"
    line("pages live", f"{view['pages_live']:,}", f"{view['pages_cached']:,} more only in the prefix cache{free}")
    for name, value, more in _pruning(view):
        line(name, value, more)
    line("pages given back", _per_second(view["pages_released_per_s"]), _of_all(view))
    line("pages allocated", _per_second(view["pages_allocated_per_s"]))
    line("prefix-cache hits", _percent(view["prefix_hit_rate"]), _since_start(view["prefix_hit_rate_total"]))
    line("prompt tokens", _per_second(view["prompt_tokens_per_s"]))
    line("generated tokens", _per_second(view["generated_tokens_per_s"]))
    return table


LAYERS_IN_A_LINE = 8
"""Layers whose shares stand in one line."""


def _pruning(view: View) -> Iterator[tuple[str, str, str]]:
    """The lines about what requests hold of what they would hold if nothing were pruned, and what it saves."""
    if view["live_share"] is None:
        yield "live share", "no requests", ""
    else:
        yield "live share", f"{view['live_share']:.1%}", f"{size(view['bytes_saved'])} saved"
        shares = view["live_share_by_layer"]
        for first in range(0, len(shares), LAYERS_IN_A_LINE):
            part = shares[first : first + LAYERS_IN_A_LINE]
            last = first + len(part) - 1
            name = f"  layer {first}" if first == last else f"  layers {first} to {last}"
            yield name, "", " ".join(f"{share:6.1%}" for share in part)
    for phase, what in (("prefill", "prompt tokens"), ("decode", "generated tokens")):
        share = view[f"{phase}_pruned"]
        value = f"no {what}" if share is None else f"{share:.1%}"
        yield f"{phase} pruned", value, "" if share is None else "of what dense attention would read"
    lag = view["report_lag_steps"]
    steps = "no reports" if lag is None else f"{lag:.1f} steps"
    yield "report lag", steps, "until the scheduler knew what was dead"


def _per_second(rate: float | None) -> str:
    return "not known" if rate is None else f"{rate:,.0f}/s"


def _percent(share: float | None) -> str:
    return "no prompts" if share is None else f"{share:.1%}"


def _since_start(share: float | None) -> str:
    return "" if share is None else f"{share:.1%} since the server started"


def _of_all(view: View) -> str:
    """How much of all that was ever allocated has been given back by pruning."""
    allocated, released = view["pages_allocated_total"], view["pages_released_total"]
    return f"{released / allocated:.1%} of all {allocated:,} since the server started" if allocated else ""
