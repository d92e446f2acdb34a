"""Kinds of heads, each defined by a rule that can be measured on a map."""

from __future__ import annotations

import numpy as np

from .classes import classify
from .record import ForgettingMap

GLOBAL_SHARE, LOCAL_SHARE, PUNCTUATION_RATIO = 0.9, 0.95, 0.5
LOCAL_WINDOW = 8
"""A local head sees within the text's length over so much."""
JUDGED = 0.75
"""Tokens in this first part of the text are judged by how long they live: later ones have too few queries after
them."""

RULES = {
    "global": f"Queries see at least {100 * GLOBAL_SHARE:.0f}\u00a0% of all earlier tokens.",
    "local": f"At least {100 * LOCAL_SHARE:.0f}\u00a0% of what queries see is among the newest tokens, within an "
    "eighth of the text's length, or two pages if that is more.",
    "punctuation-dropper": "Tokens are dropped one by one, and later queries see punctuation at most half as often "
    "as names, numbers and keywords.",
    "content-dependent": "None of these: the text decides what is kept.",
}
"""The kinds, and the rule of each as it stands in the page. The first that holds counts. The first two are about
the queries in the second half of the text, the third about tokens in its first three quarters."""


def rules(record: ForgettingMap) -> dict[str, str]:
    """Return :data:`RULES` as they read for a map: where whole pages are dropped, no token is kept for what it
    is."""
    if record.page_size == 1:
        return RULES
    return RULES | {"content-dependent": "None of these: how far back it sees changes with the text."}


def window(record: ForgettingMap) -> int:
    """Return the tokens within which a local head sees."""
    return max(record.tokens // LOCAL_WINDOW, 2 * record.page_size)


def shares(record: ForgettingMap) -> tuple[np.ndarray, np.ndarray]:
    """Return, over the queries in the second half of the text, the share of earlier tokens that they see, and the
    share of what they see that is within :func:`window`: [L * S] each, 0 to 1."""
    later = slice(record.tokens // 2, None)
    seen = record.live[:, later].sum(1)
    near = record.seen_within(window(record))[:, later].sum(1)
    return seen / np.arange(1, record.tokens + 1)[later].sum(), near / seen


def punctuation(record: ForgettingMap) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean share of later queries that see punctuation, and that see names, numbers and keywords.

    Returns:
        [L * S] each, 0 to 1; NaN where the text has no such token.
    """
    judged = int(record.tokens * JUDGED)
    found = np.array([classify(piece) for piece in record.pieces[:judged]], dtype=object)
    light = found == "punctuation"
    seen = record.seen_share[:, :judged]
    nothing = np.full(len(seen), np.nan)
    parts = (light, ~light & (found != "whitespace"))
    both = [seen[:, which].mean(1) if which.any() else nothing for which in parts]
    return both[0], both[1]


def kinds(record: ForgettingMap) -> list[str]:
    """Return the kind of each stream, one of :data:`RULES`: [L * S]."""
    seen, near = shares(record)
    light, other = punctuation(record)
    found = []
    for number in range(len(seen)):
        if seen[number] >= GLOBAL_SHARE:
            found.append("global")
        elif near[number] >= LOCAL_SHARE:
            found.append("local")
        elif record.page_size == 1 and light[number] <= PUNCTUATION_RATIO * other[number]:
            found.append("punctuation-dropper")
        else:
            found.append("content-dependent")
    return found
