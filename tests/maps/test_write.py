"""A map's file is whole or as it was, on a disk that takes no more."""

from __future__ import annotations

import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.maps import made, random_ends, windowed
from vllm_fox.maps.write import render, write


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The operating system lets no file of this process grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    old = made(windowed(8, 3)[None, None])
    size = write(old, path)
    assert path.read_text() == render(old) and size == path.stat().st_size
    record = made(random_ends(4, 8, 500))
    with files_of_at_most(size), pytest.raises(OSError, match=f"'{path}'"):
        write(record, path)
    assert path.read_text() == render(old)
    assert [one.name for one in tmp_path.iterdir()] == ["map.html"]
    write(record, path)
    assert path.read_text() == render(record)


def test_links_and_pipes_stay_what_they_are(tmp_path: Path) -> None:
    record = made(windowed(8, 3)[None, None])
    (tmp_path / "folder").mkdir()
    link = tmp_path / "map.html"
    link.symlink_to(tmp_path / "folder" / "there.html")
    write(record, link)
    assert link.is_symlink() and (tmp_path / "folder" / "there.html").read_text() == render(record)
    pipe, read = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    size = write(record, pipe)
    reader.join()
    assert stat.S_ISFIFO(pipe.stat().st_mode) and len(read[0]) == size
