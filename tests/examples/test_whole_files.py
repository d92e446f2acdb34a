"""Files that are whole or not there, and files that others wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import whole_files
from whole_files import Unreadable


def full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    whole_files.write_whole(file, '{"a": "é"}')
    assert whole_files.read_record(file) == {"a": "é"}
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        whole_files.write_whole(file, "{}")
    assert whole_files.read_record(file) == {"a": "é"} and list(tmp_path.iterdir()) == [file]
    with pytest.raises(RuntimeError), whole_files.replacing(tmp_path / "other") as new:
        new.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_written_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file, then its name; of a folder all files, the folder, then its name."""
    done: list[str] = []
    replace, rename = os.replace, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(Path(f"/proc/self/fd/{handle}").readlink().name))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("named"), replace(old, new)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (done.append("named"), rename(old, new)))
    whole_files.write_whole(tmp_path / "a", "x")
    assert [name.split(".")[-2:-1] or name for name in done] == [["a"], "named", tmp_path.name]
    done.clear()
    (tmp_path / "new" / "deep").mkdir(parents=True)
    (tmp_path / "new" / "deep" / "b").write_text("x")
    whole_files.publish(tmp_path / "new", tmp_path / "folder")
    assert sorted(done[:3]) == ["b", "deep", "new"] and done[3:] == ["named", tmp_path.name]
    assert (tmp_path / "folder" / "deep" / "b").read_text() == "x"


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b'{"a": "\xff"}'])
def test_a_torn_record_is_named_and_passed_over(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert whole_files.read_record(tmp_path / "none.json") is None
    assert not capsys.readouterr().err
    (tmp_path / "record.json").write_bytes(content)
    assert whole_files.read_record(tmp_path / "record.json") is None
    assert capsys.readouterr().err == f"{tmp_path / 'record.json'} is passed over: it is torn.\n"


def test_lines_end_at_newlines_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where else Unicode sees an end; and a torn line takes no other with it."""
    rows = [{"n": n, "text": f"a{mark}b"} for n, mark in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\r")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows").write_bytes("\n".join([*lines[:3], '{"n": 2', *lines[3:], '{"n": 7, "te']).encode())
    assert list(whole_files.read_records(tmp_path / "rows")) == rows
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{tmp_path / 'rows'}, line {n} is passed over: it is torn." for n in (4, 9)]
    assert whole_files.lines_of("a\u2028b\r\nc\n") == ["a\u2028b", "c", ""]
    assert list(whole_files.read_records(tmp_path / "none")) == []


def test_a_folder_knows_whether_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "weights"
    file.write_bytes(b"12345678")
    assert whole_files.flaw_of(tmp_path) == ""  # no list
    whole_files.list_contents(tmp_path)
    assert whole_files.flaw_of(tmp_path) == ""
    for content in (b"1234567", b"12345670", b""):
        file.write_bytes(content)
        assert whole_files.flaw_of(tmp_path) == "deep/weights is torn"
    file.unlink()
    assert whole_files.flaw_of(tmp_path) == "deep/weights is missing"
    (tmp_path / whole_files.CONTENTS).write_text("")
    assert whole_files.flaw_of(tmp_path) == f"{whole_files.CONTENTS} is torn"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "is full: It was not written."),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "is full: It was not written."),
        (PermissionError(13, "Permission denied", "x"), r"cannot be written \(.*\): It was not written."),
    ],
)
def test_a_disk_that_refuses_is_said(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=said), whole_files.refusal_said(tmp_path, "It was not written."):
        raise error


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), whole_files.refusal_said(tmp_path / "not" / "yet", "x"):
        raise RuntimeError("of torch's writer")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(SystemExit, match="is full"), whole_files.refusal_said(tmp_path / "not" / "yet", "x"):
        raise RuntimeError("of torch's writer")


def test_texts_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read without their byte order mark, or named."""
    (tmp_path / "marked.txt").write_bytes("\ufeffé\r\n".encode())
    assert whole_files.read_text(tmp_path / "marked.txt") == "é\r\n"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    cases = {
        "latin": "is not UTF-8 text, from byte 3 on",
        "folder": "is not a file",
        "link": "is a link to nothing",
        "loop": "is a link to nothing",
        "pipe": "is not a file",
        "none": "is not a file",
    }
    for name, said in cases.items():
        with pytest.raises(Unreadable, match=f"{name}.txt {said}"):
            whole_files.read_text(tmp_path / f"{name}.txt")

    def denied(path: Path) -> bytes:  # as for a user who is not root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(Unreadable, match=r"marked.txt cannot be read: Permission denied\."):
        whole_files.read_text(tmp_path / "marked.txt")


def test_folders_are_searched_without_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.txt").mkdir()
    for name in ("a", "b.txt/c", "own/d", "link"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    found = whole_files.files_under(Path("."), tmp_path / "own")
    assert [str(path) for path in found] == ["a", "b.txt/c", "link"]
    with pytest.raises(Unreadable, match="nowhere cannot be read: No such file"):
        whole_files.files_under(Path("nowhere"))
    name = Path(os.fsdecode(b"caf\xe9.txt"))
    assert whole_files.printable(name) == "caf\\xe9.txt"
