"""examples/text_corpus.py: which files are read, and what is written of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from text_corpus import Corpus, find_texts, prepare


def test_what_is_no_text_is_named_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        b"a.txt": b"plain",
        b"marked.txt": "\ufeffmarked".encode(),
        b"copy.txt": b"marked",
        b"caf\xe9.txt": b"a name that is not UTF-8",
        b"latin.txt": b"caf\xe9",
        b"wide.txt": "wide".encode("utf-16"),
        b"zero.txt": b"a\0b",
        b"ends.txt": b"a<|endoftext|>b",
        b"space.txt": b" \n",
    }.items():
        Path(os.fsdecode(name)).write_bytes(content)
    Path("folder.txt").mkdir()
    Path("folder.txt", "inner.txt").write_text("in a folder")
    Path("link.txt").symlink_to("nowhere")
    Path("out").mkdir()
    Path("out", "log.txt").write_text("written by the program")
    found = [os.fsencode(path) for path in find_texts(Path("."), Path("out"))]
    assert found == [b"a.txt", b"caf\xe9.txt", b"copy.txt", b"folder.txt/inner.txt"]
    said = capsys.readouterr().err
    assert said.count("\n") == 5
    for name in (
        "latin.txt is not UTF-8",
        "wide.txt",
        "zero.txt",
        "ends.txt has <|endoftext|>",
        "link.txt is a link",
    ):
        assert f"Passed over: {name}" in said
    for number in range(3):
        Path(f"more{number}.txt").write_bytes(b"\xff")
    find_texts(Path("."))
    assert "Passed over: 3 more files of ." in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is to be written to as well: choose another --output"):
        find_texts(Path("."), tmp_path)


def test_names_that_are_not_utf8_are_prepared(text: Path, tmp_path: Path) -> None:
    texts = tmp_path / os.fsdecode(b"t\xe9xts")
    shutil.copytree(text, texts)
    (texts / os.fsdecode(b"caf\xe9.py")).write_text("x = 1\n")
    for _ in range(2):  # the second time from what is there
        prepare(texts, tmp_path / "out" / "data", 300, 0)
    assert len(Corpus.open(tmp_path / "out" / "data").train) > 1000


def test_what_is_written_inside_the_texts_is_not_read(text: Path, tmp_path: Path) -> None:
    """Nor is it when the texts are prepared anew, for another seed."""
    shutil.copytree(text, tmp_path / "texts")
    data = tmp_path / "texts" / "out" / "data"
    files = []
    for seed in (0, 1):
        prepare(tmp_path / "texts", data, 300, seed)
        (data.parent / "arguments.json").write_text('{"a": "some text"}')
        files.append(Corpus.open(data).facts["files"])
    assert files[0] == files[1]


def test_torn_token_ids_are_made_anew(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data"
    prepare(text, data, 300, 0)
    whole = np.array(Corpus.open(data).train)
    written = (data / "facts.json").stat().st_mtime_ns
    prepare(text, data, 300, 0)
    assert (data / "facts.json").stat().st_mtime_ns == written
    for name in ("facts.json", "train.npy", "held_out.npy", "tokenizer.json"):
        for size in (0, (data / name).stat().st_size // 2):
            os.truncate(data / name, size)
            capsys.readouterr()
            prepare(text, data, 300, 0)
            assert "is passed over: it is torn" in capsys.readouterr().err
            assert np.array_equal(Corpus.open(data).train, whole)


def test_nothing_is_written_of_what_is_refused(text: Path, tmp_path: Path) -> None:
    def refuse(train: int, held_out: int) -> None:
        raise SystemExit(f"{train} and {held_out} are too few.")

    with pytest.raises(SystemExit, match="are too few"):
        prepare(text, tmp_path / "out" / "data", 300, 0, check=refuse)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(SystemExit, match="tokenizer.json is no tokenizer"):
        prepare(text, tmp_path / "out" / "data", 300, 0, tmp_path / "tokenizer.json")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_token_ids(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SystemExit, match=r"data is full: .*run the same command again\."):
            prepare(text, tmp_path / "data", 300, 0)
    assert not (tmp_path / "data").exists()
    prepare(text, tmp_path / "data", 300, 0)
    assert len(Corpus.open(tmp_path / "data").train)
