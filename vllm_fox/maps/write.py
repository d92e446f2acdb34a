"""Write a map as one HTML file that needs no network: text, data, style and script are all in it."""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from .classes import CLASSES
from .figures import classes, dropped_first, drops_soonest, streams
from .kinds import rules
from .record import ForgettingMap

SCRIPTS = ("data.js", "text.js", "plots.js", "heads.js", "tokens.js", "figure.js", "app.js")
"""Files of the page's script, in the order in which they stand in it."""


def write(record: ForgettingMap, path: Path) -> int:
    """Write the page, and return its size in bytes. A file that is there stays as it was if that fails."""
    page, path = render(record).encode(), path.resolve()
    if path.exists() and not path.is_file():  # a pipe, or a device such as standard output
        path.write_bytes(page)
        return len(page)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(page)
        new.replace(path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    return len(page)


def render(record: ForgettingMap) -> str:
    """Return the page."""
    folder = files("vllm_fox.maps") / "page"
    # In a script element, nothing but "<" could end it.
    data = json.dumps(page_data(record), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=f"What {record.model} forgets".replace("&", "&amp;").replace("<", "&lt;"),
        style=(folder / "style.css").read_text(encoding="utf-8"),
        data=data.replace("<", "\\u003c"),
        script="\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS),
    )


def page_data(record: ForgettingMap) -> dict[str, Any]:
    """Return what the page's script reads, as JSON has it."""
    found = streams(record)
    ends, wide = pack(record)
    return {
        "model": record.model,
        "family": record.family,
        "source": record.source,
        "stream": record.stream,
        "tokens": record.tokens,
        "textTokens": record.text_tokens,
        "layers": record.layers,
        "streams": record.streams,
        "pageSize": record.page_size,
        "givenBackAtEnd": float(record.given_back[-1]),
        "givenBack": record.given_back_overall,
        "pieces": record.pieces,
        "heads": [vars(one) for one in found],
        "rules": rules(record),
        "classNames": CLASSES,
        "classShares": [[None if math.isnan(x) else round(x, 4) for x in row] for row in classes(record).tolist()],
        "soonest": drops_soonest(record),
        "droppedFirst": [
            [[one.token, one.times, round(one.seen, 4), one.lives] for one in row] for row in dropped_first(record)
        ],
        "ends": ends,
        "wide": wide,
    }


def pack(record: ForgettingMap) -> tuple[str, bool]:
    """Return the ends of all streams as base64 of zlib's deflate, and whether its numbers have 32 bits or 16.

    The numbers are those of the streams one after the other: of each page if pages are dropped as a whole, else of
    each token, the distance from its first position to its end, or 0 if all queries see it. They are unsigned and
    little endian.
    """
    first = np.arange(0, record.tokens, record.page_size)
    ends = record.flat[:, first]
    lives = np.where(ends == record.tokens, 0, ends - first)
    wide = record.tokens >= 2**16
    return base64.b64encode(zlib.compress(lives.astype("<u4" if wide else "<u2").tobytes(), 9)).decode(), wide
