"""Numbers of bytes for people."""

from __future__ import annotations


def size(count: int) -> str:
    """Return a number of bytes with two digits behind the point, in the largest unit that is not above it."""
    for unit, large in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= large:
            return f"{count / large:,.2f} {unit}"
    return f"{count} bytes"
