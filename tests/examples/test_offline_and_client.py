"""What examples/offline.py and examples/client.py are given to read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import offline
import pytest

from tests.support import ROOT


def test_a_file_has_a_prompt_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.txt").write_bytes("\ufefffirst\u2028still\r\n\r\n  \nsecond\x0cstill\n".encode())
    monkeypatch.setattr(sys, "argv", ["offline.py", "--prompt=zeroth", f"--prompts-file={tmp_path / 'p.txt'}"])
    assert offline.arguments().prompt == ["zeroth", "first\u2028still", "second\x0cstill"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("latin.txt", "latin.txt is not UTF-8 text, from byte 3 on: save it as UTF-8."),
        ("folder.txt", "folder.txt is not a file."),
        ("link.txt", "link.txt is a link to nothing."),
        ("none.txt", "none.txt is not a file."),
        ("empty.txt", "empty.txt has no prompts: it has nothing but empty lines."),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.setattr(sys, "argv", ["offline.py", f"--prompts-file={tmp_path / name}"])
    with pytest.raises(SystemExit) as ended:
        offline.arguments()
    found = capsys.readouterr().err
    assert ended.value.code == 2 and found.count("\n") == 1 and said in found


def test_text_for_a_model_is_utf8(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["offline.py", "--prompt", os.fsdecode(b"caf\xe9")])
    with pytest.raises(SystemExit):
        offline.arguments()
    assert "--prompt is 'caf\\udce9': it must be UTF-8." in capsys.readouterr().err
    command = [sys.executable, str(ROOT / "examples" / "client.py"), "--base-url=http://127.0.0.1:9/v1"]
    for content, code, said in (
        (b"caf\xe9", 1, "The text on standard input is not UTF-8 text, from byte 3 on: save it as UTF-8.\n"),
        ("café".encode(), 1, "client: no server answers at http://127.0.0.1:9/v1 (Connection error.)\n"),
    ):
        done = subprocess.run(command, input=content, capture_output=True)
        assert (done.returncode, done.stderr.decode()) == (code, said)
