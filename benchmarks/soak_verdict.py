"""What ``benchmarks.soak`` has found: figures of a run, what is wrong in them, a table and a plot."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.soak_load import BOUND, MIX, Outcome

IN_USE = ("requests_running", "requests_waiting", "pages_live", "kv_usage")
"""Figures that are 0 of an idle server. Pages that only the prefix cache holds are in none of them."""
TOKEN_BYTES = 8
"""What a list of tokens takes for each: a pointer."""
BLOCKS = 8
"""Parts of the last third of a run whose means make its trend."""


def growth(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How the resident memory of each of the server's processes grows over the last third of a run.

    Returns:
        None if it has fewer than three samples for each of :data:`BLOCKS` equal parts. Else for each process by its
        name (``processes``) the MiB, by least squares through the parts' means, and two standard errors of them;
        and the MiB that it would have grown at least if the server kept something of every request (``least``):
        the ids of its tokens, in a list.
    """
    if not samples:
        return None
    begin = samples[0]["at"] + 2 / 3 * (samples[-1]["at"] - samples[0]["at"])
    last = [one for one in samples if one["at"] >= begin]
    if len(last) < 3 * BLOCKS:
        return None
    names = set.intersection(*(set(one["processes_mib"]) for one in last))
    tokens = last[-1]["tokens"] - last[0]["tokens"]
    found = {name: _trend([one["processes_mib"][name] for one in last]) for name in sorted(names)}
    return {"processes": found, "least": TOKEN_BYTES * tokens / 2**20}


def _trend(values: Sequence[float]) -> tuple[float, float]:
    """By how much a series grows from its beginning to its end, and two standard errors of that.

    What comes and goes within a few samples, as memory does with the requests, is no trend. So it is that of the
    parts' means, whose deviations from it are taken for independent.
    """
    means = np.array([part.mean() for part in np.array_split(np.array(values), BLOCKS)])
    place = np.arange(BLOCKS) / (BLOCKS - 1)
    (slope, level), residuals, *_ = np.polyfit(place, means, 1, full=True)
    variance = float(residuals[0]) / (BLOCKS - 2) if residuals.size else 0.0
    error = (variance / float(((place - place.mean()) ** 2).sum())) ** 0.5
    return float(slope), 2 * error


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """For each kind of request: its number, those cut off, errors, and seconds to the first token and in all."""
    rows = {}
    for kind in (*MIX, "burst"):
        mine = [one for one in outcomes if one.kind == kind]
        whole = [one.end - one.begin for one in mine if not one.error and not one.cut]
        first = [one.first - one.begin for one in mine if one.first is not None]
        rows[kind] = {
            "requests": len(mine),
            "cut": sum(one.cut for one in mine),
            "errors": sum(one.error is not None for one in mine),
            "first_token_s": _quantiles(first),
            "whole_s": _quantiles(whole),
        }
    return rows


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 99)} if values else None


def errors_of(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many errors of each kind."""
    return dict(Counter(one.error for one in outcomes if one.error is not None))


def failures(figures: Mapping[str, Any], *, judge_memory: bool) -> list[str]:
    """What is wrong, a sentence each; nothing if the server may be left alone."""
    found = []
    for kind, count in figures["errors"].items():
        found.append(f"{count} requests failed with {kind}.")
    for what, count in figures["wrong"].items():
        found.append(f"{what}: {count} requests.")
    if not figures["requests"]:
        found.append("No request was sent.")
    if not figures["preemptions"]:
        found.append("No request was preempted: give less --kv-contexts, or a higher --rate.")
    for when, state in figures["idle"].items():
        if left := {name: state[name] for name in IN_USE if state[name]}:
            found.append(f"The server is not idle {when}: {left}.")
    compared = figures["compared"]
    if not compared["answers"]:
        found.append("No greedy answer was compared.")
    for one in compared["wrong"]:
        found.append(f"A greedy answer differs by {one['difference']:.3g} nats, which is more than {BOUND:g}.")
    growth = figures["growth"]
    if growth is None:
        found.append("There are too few samples to tell whether memory grows.")
    elif judge_memory:
        for name, (mib, error) in growth["processes"].items():
            if mib - error > growth["least"]:
                found.append(
                    f"The memory of {name} has grown by {mib:.1f} ± {error:.1f} MiB over the last third. The "
                    f"tokens of its requests alone would take {growth['least']:.1f} MiB."
                )
    return found


def table(figures: Mapping[str, Any]) -> str:
    """What was sent, what became of it, and what the server held."""

    def pair(row: Mapping[str, float] | None) -> str:
        return f"{row['p50']:>9.2f}{row['p99']:>8.2f}" if row else f"{'-':>9}{'-':>8}"

    lines = [f"{'requests':<14}{'sent':>7}{'cut off':>9}{'errors':>8}{'first token: p50, p99 s':>26}{'whole':>18}"]
    for kind, row in figures["by_kind"].items():
        lines.append(
            f"{kind:<14}{row['requests']:>7}{row['cut']:>9}{row['errors']:>8}         "
            f"{pair(row['first_token_s'])} {pair(row['whole_s'])}"
        )
    compared, memory, lag = figures["compared"], figures["memory_mib"], figures["report_lag_steps"]
    growth = figures["growth"] or {"processes": {}, "least": math.nan}
    rows = [
        ("minutes", f"{figures['seconds'] / 60:.1f}"),
        ("requests that were not sent, since too many were in flight", figures["not_sent"]),
        ("preemptions", figures["preemptions"]),
        ("KV memory in use, at most", f"{figures['peak_kv_usage']:.0%}"),
        ("KV pages live, at most", f"{figures['peak_pages']:,}"),
        ("KV pages live at the end", f"{figures['idle']['at the end']['pages_live']:,}"),
        ("KV pages cached at the end", f"{figures['idle']['at the end']['pages_cached']:,}"),
        ("report lag, mean steps", "-" if lag is None else f"{lag:.2f}"),
        ("memory of the server, first and last MiB", f"{memory[0]:.0f}, {memory[1]:.0f}"),
        *(
            (f"growth over the last third, MiB: {name}", f"{mib:+.1f} ± {error:.1f}")
            for name, (mib, error) in growth["processes"].items()
        ),
        ("the tokens of its requests, MiB", "-" if math.isnan(growth["least"]) else f"{growth['least']:.1f}"),
        ("greedy answers asked for again", compared["answers"]),
        ("of these with other tokens", compared["other_tokens"]),
        ("largest difference of a token, nats", f"{compared['largest']:.2e}"),
    ]
    return "\n".join([*lines, "", *(f"{label:<60}{value!s:>16}" for label, value in rows)])


def plot(path: Path, samples: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome]) -> None:
    """Memory, pages and latency over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(8, 7), sharex=True)
    at = [one["at"] / 60 for one in samples]
    axes[0].plot(at, [one["memory_mib"] for one in samples])
    axes[0].set_ylabel("server's memory, MiB")
    for name in ("live", "cached"):
        axes[1].plot(at, [one[f"pages_{name}"] for one in samples], label=name)
    axes[1].set_ylabel("KV pages")
    axes[1].legend()
    first = [(one.end / 60, one.first - one.begin) for one in outcomes if one.first is not None]
    axes[2].scatter([x for x, _ in first], [y for _, y in first], s=4)
    axes[2].set_ylabel("first token, s")
    axes[2].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"saved {path}")
