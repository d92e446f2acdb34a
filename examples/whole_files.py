"""Files that a program writes and must be able to read again, and files that others wrote.

What a program writes is whole or not there, also after a kill, a full disk or a power cut. What is torn all the
same, because another program or an earlier version wrote it, is named on standard error and passed over. Lines end
at ``\\n`` alone: the other characters that Unicode counts as ends of lines are part of a text.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CONTENTS = "contents.json"
"""In a folder: the sizes and the SHA-256 of its files."""


class Unreadable(SystemExit):
    """A file that others wrote cannot be read. Ends the program, unless caught, with a sentence that names it."""


# What a program writes.


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path``, to be written in the block, which takes its place at the end.

    If the block or the disk fails, ``path`` stays as it was and the new file is removed.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield new
        _settle(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a file, in UTF-8, or replace it."""
    with replacing(path) as new:
        new.write_bytes(text.encode())


def publish(new: Path, folder: Path) -> None:
    """Let a folder that is complete take the place of ``folder``."""
    settle_all(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    _settle(folder.parent)


def settle_all(folder: Path) -> None:
    """Return once all that is in a folder would survive a power cut."""
    for place, _, names in os.walk(folder):
        for name in names:
            _settle(Path(place, name))
        _settle(Path(place))


def list_contents(folder: Path) -> None:
    """Write :data:`CONTENTS`, so that :func:`flaw_of` can tell whether the folder is whole."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    found = {name: [(folder / name).stat().st_size, _digest(folder / name)] for name in names}
    write_whole(folder / CONTENTS, json.dumps(found, indent=1))


def flaw_of(folder: Path) -> str:
    """What is wrong with a folder, by its :data:`CONTENTS`; empty if it is whole, or has no such list."""
    listed = read_record(folder / CONTENTS)
    if listed is None:
        return f"{CONTENTS} is torn" if (folder / CONTENTS).exists() else ""
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _digest(path) != digest:
            return f"{name} is torn"
    return ""


@contextmanager
def refusal_said(folder: Path, lost: str) -> Iterator[None]:
    """Make of a disk that is full or may not be written, whichever library meets it, a SystemExit that says so.

    Args:
        folder: on that disk.
        lost: what is not written because of it, and what to do; sentences.
    """
    hook = threading.excepthook
    # A library's own thread that meets it too need not say so as well.
    threading.excepthook = lambda of: None if _says_full(of.exc_value) else hook(of)
    try:
        yield
    except Exception as error:
        # Of torch's writer that there is no room is all that tells.
        if _says_full(error) or (isinstance(error, RuntimeError) and free_bytes(folder) < 1 << 20):
            raise SystemExit(f"The disk of {folder} is full: {lost}") from None
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise SystemExit(f"{folder} cannot be written ({error}): {lost}") from None
        raise
    finally:
        threading.excepthook = hook


def _says_full(error: BaseException | None) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that a folder is on, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _settle(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that cannot do it for folders
            raise
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What it reads again.


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file, or it is torn, which is said."""
    try:
        return _record(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        pass_over(str(path), "it is torn")
        return None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects in the lines of a file, none if it is not there. Torn lines are named and left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _record(line)
            except ValueError:
                pass_over(f"{path}, line {number}", "it is torn")


def pass_over(what: str, why: str) -> None:
    """Say on standard error that something is not read."""
    print(f"{what} is passed over: {why}.", file=sys.stderr, flush=True)


def _record(content: bytes) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


# What others wrote.


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark in front.

    Raises:
        Unreadable: it is not a file, may not be read, or is not UTF-8.
    """
    try:
        if not path.is_file():
            raise Unreadable(f"{path} is {'a link to nothing' if path.is_symlink() else 'not a file'}.")
        return text_of(path.read_bytes(), str(path))
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}.") from None


def text_of(content: bytes, name: str) -> str:
    """Bytes as text, without a byte order mark in front. Raises Unreadable if they are not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{name} is not UTF-8 text, from byte {error.start} on: save it as UTF-8.") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends, ``\\n`` or ``\\r\\n``."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def files_under(
    folder: Path, without: Path | None = None, unreadable: Callable[[Unreadable], None] | None = None
) -> list[Path]:
    """All in a folder and in those below it that is not a folder, sorted. Links to folders are not followed.

    Args:
        without: a folder that is left out, such as one that the program writes to.
        unreadable: is called for every folder that may not be read.

    Raises:
        Unreadable: a folder may not be read, and nothing is to be called then.
    """
    own = None if without is None else without.resolve()
    found: list[Path] = []

    def fail(error: OSError) -> None:
        unread = Unreadable(f"{error.filename} cannot be read: {error.strerror}.")
        if unreadable is None:
            raise unread
        unreadable(unread)

    for place, folders, names in os.walk(folder, onerror=fail):
        here = Path(place)
        folders[:] = [name for name in folders if (here / name).resolve() != own]
        found += [here / name for name in names]
    return sorted(found)


def printable(path: Path) -> str:
    """A path as text that can be printed and saved: bytes of it that are not UTF-8 become ``\\xNN``."""
    return os.fsencode(path).decode(errors="backslashreplace")
