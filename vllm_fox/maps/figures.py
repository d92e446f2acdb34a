"""Figures and sentences about a map: what its heads do, and what is dropped first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .classes import CLASSES, classify
from .kinds import JUDGED, RULES, kinds
from .record import ForgettingMap

LISTED = 12
"""Tokens in a list of those that are dropped first."""
LEAST_TIMES, LEAST_SHARE = 3, 0.005
"""A token is listed if it stands in the judged part of the text at least so many times, and is at least this share
of it: how long two or three tokens live may be chance."""


@dataclass(frozen=True)
class Dropped:
    """All tokens of one text together.

    Attributes:
        token: the text.
        times: how often it stands in the judged part.
        seen: mean share of later queries that see it, 0 to 1.
        lives: median number of queries that see it, its own included.
    """

    token: str
    times: int
    seen: float
    lives: int


@dataclass(frozen=True)
class Stream:
    """What a stream does.

    Attributes:
        layer, head: which one; the head is 0 where a layer is one stream.
        kind: one of :data:`.kinds.RULES`.
        says: the same in a sentence.
        mean_live, least_live, most_live: tokens that queries in the second half of the text see.
        live_at_end: tokens that the last query sees.
        given_back: share of earlier tokens that queries in the second half of the text do not see, 0 to 1.
    """

    layer: int
    head: int
    kind: str
    says: str
    mean_live: float
    least_live: int
    most_live: int
    live_at_end: int
    given_back: float


def streams(record: ForgettingMap) -> list[Stream]:
    """Return the figures of all streams, layer by layer."""
    begin = record.tokens // 2
    dense = np.arange(1, record.tokens + 1)[begin:]
    found = []
    for number, (kind, live) in enumerate(zip(kinds(record), record.live, strict=True)):
        late = live[begin:]
        layer, head = divmod(number, record.streams)
        stream = Stream(
            layer, head, kind, "", float(late.mean()), int(late.min()), int(late.max()), int(live[-1]),
            float(1 - late.sum() / dense.sum()),
        )  # fmt: skip
        found.append(_with_sentence(record, number, stream))
    return found


def _with_sentence(record: ForgettingMap, number: int, found: Stream) -> Stream:
    name = record.name(number)
    pages = record.page_size > 1
    why = "how far back it sees changes with the text" if pages else "the text decides what it keeps"
    says = {
        "global": "is global: it sees nearly the whole text so far",
        "local": "is local: it sees little more than the newest tokens",
        "punctuation-dropper": "drops punctuation soon and keeps names, numbers and keywords longer",
        "content-dependent": f"is content-dependent: {why}",
    }[found.kind]
    live, share = int(found.mean_live + 0.5), f"{1 - found.given_back:.0%}".replace("%", "\u00a0%")
    counts = (
        f"It keeps {live:,} token{'s' * (live != 1)} on average over the second half of the text "
        f"({found.least_live:,} to {found.most_live:,}), {share} of the text so far."
    )
    return replace(found, says=f"{name[0].upper()}{name[1:]} {says}. {counts}")


def classes(record: ForgettingMap) -> np.ndarray:
    """Return the mean share of later queries that see the tokens of each class of :data:`.classes.CLASSES`.

    Returns:
        [L * S + 1, classes] float64, 0 to 1, NaN where the text has no such token. The last row is the mean of all
        streams.
    """
    judged = int(record.tokens * JUDGED)
    number = np.array([CLASSES.index(classify(piece)) for piece in record.pieces[:judged]], dtype=np.int64)
    seen = record.seen_share[:, :judged]
    found = np.full((len(seen) + 1, len(CLASSES)), np.nan)
    for which in range(len(CLASSES)):
        if (number == which).any():
            found[:-1, which] = seen[:, number == which].mean(1)
    found[-1] = found[:-1].mean(0)
    return found


def dropped_first(record: ForgettingMap) -> list[list[Dropped]]:
    """Return the tokens that are dropped first, by each stream and, last, by all together.

    Where pages are dropped as a whole a token's age decides, not what it is, and the lists are empty.
    """
    count = len(record.flat)
    judged = int(record.tokens * JUDGED)
    if record.page_size > 1:
        return [[] for _ in range(count + 1)]
    texts, which, times = np.unique(
        np.array(record.pieces[:judged], dtype=object), return_inverse=True, return_counts=True
    )
    often = np.flatnonzero(times >= max(LEAST_TIMES, LEAST_SHARE * judged))
    lives = record.flat[:, :judged] - np.arange(judged)
    sums = np.stack(
        [np.bincount(which, weights=row, minlength=len(texts)) for row in record.seen_share[:, :judged]]
    )
    means = np.concatenate((sums, sums.mean(0, keepdims=True)))[:, often] / times[often]
    found = []
    for row, mean in enumerate(means):
        first = np.lexsort((-times[often], mean.round(6)))[:LISTED]
        mine = lives[row : row + 1] if row < count else lives
        found.append(
            [
                Dropped(texts[n], int(times[n]), float(seen), int(np.median(mine[:, which == n])))
                for n, seen in zip(often[first].tolist(), mean[first].tolist(), strict=True)
            ]
        )
    return found


def drops_soonest(record: ForgettingMap) -> tuple[int, int]:
    """Return the number of the stream that drops soonest, and how many later queries see half of its tokens at
    most.

    Looked at are tokens in the first three quarters of the text.
    """
    judged = max(1, int(record.tokens * JUDGED))
    later = record.flat[:, :judged] - np.arange(judged) - 1
    half = np.sort(later, 1)[:, (judged - 1) // 2]
    number = int(np.lexsort((later.mean(1), half))[0])
    return number, int(half[number])


def summary(record: ForgettingMap) -> dict[str, Any]:
    """Return the figures of the whole model, as ``vllm-fox map --json`` prints them."""
    found = streams(record)
    return {
        "model": record.model,
        "family": record.family,
        "source": record.source,
        "tokens": record.tokens,
        "text_tokens": record.text_tokens,
        "layers": record.layers,
        "streams": len(found),
        "dropped_together": record.page_size,
        "given_back_at_end": float(record.given_back[-1]),
        "given_back": record.given_back_overall,
        "kinds": {kind: sum(one.kind == kind for one in found) for kind in RULES},
        "heads": [vars(one) for one in found],
        "dropped_first": [vars(one) for one in dropped_first(record)[-1]],
    }
