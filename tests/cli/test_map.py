"""``vllm-fox map``."""

from __future__ import annotations

import inspect
import io
import json
import re
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import ROOT

from .conftest import Run, documented


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "textwrap.py"
    path.write_text(inspect.getsource(textwrap))
    return path


def test_a_page_is_written_and_what_it_says_is_printed(
    run: Run, fox_tiny: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    done = run("map", fox_tiny, text, "--output", out, "--max-tokens", "900")
    assert done.code == 0 and not done.err
    first, share, kinds, written = done.out.splitlines()
    assert re.fullmatch(r".*fox-tiny \(.*\) has read the first 900 of [\d,]+ tokens, from transformers\.", first)
    assert re.search(r"\d+% of the KV cache is given back at the end of the text, and \d+% on average", share)
    assert re.fullmatch(r"Of 32 heads: \d global, \d+ local, \d+ content-dependent\.", kinds)
    assert str(out) in written
    page = out.read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*)</script>', page)[1])  # type: ignore[index]
    assert data["tokens"] == 900 and len(data["heads"]) == 32
    # Nothing is loaded from elsewhere.
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org)", page.replace(json.dumps(data), ""))


def test_json(run: Run, dcp_tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text comes from standard input."""
    given = io.TextIOWrapper(io.BytesIO(text.read_bytes()))
    monkeypatch.setattr(sys, "stdin", given)
    done = run("map", dcp_tiny, "-", "--output", tmp_path / "map.html", "--max-tokens", "700", "--json")
    found = done.json()
    assert found["tokens"] == 700 and found["bytes"] == (tmp_path / "map.html").stat().st_size
    assert set(found) | set(found["heads"][0]) | set(found["dropped_first"][0]) == documented("map")
    assert sum(found["kinds"].values()) == found["streams"] == len(found["heads"]) == 4


@pytest.mark.parametrize("name", ["fox-tiny", "dcp-tiny"])
def test_the_documentation_shows_what_a_map_says(name: str, run: Run, tmp_path: Path) -> None:
    """But for percentages and kilobytes, which differ by one where a processor rounds otherwise."""
    shown = (ROOT / "docs" / "command_line.md").read_text()
    wanted = shown.split(f"    $ vllm-fox map examples/{name} LICENSE")[1].split("\n\n")[0].splitlines()[1:]
    out = tmp_path / "map.html"
    done = run("map", ROOT / "examples" / name, ROOT / "LICENSE", "--output", out)
    found = done.out.replace(f"{ROOT}/", "").replace(str(out), "map.html" if name == "fox-tiny" else "dcp.html")
    number = r"\b(\d+)(?=%| kB)"
    for line, said in zip(wanted, found.splitlines(), strict=True):
        assert re.sub(number, "", said) == re.sub(number, "", line.strip())
        assert [int(n) for n in re.findall(number, said)] == pytest.approx(
            [int(n) for n in re.findall(number, line)], abs=1
        )


def test_mistakes(run: Run, fox_tiny: Path, text: Path, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    empty = tmp_path / "empty"
    empty.touch()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "gpt2"}')
    for words, code, part in (
        ((fox_tiny, "nowhere"), 2, "TEXT is nowhere, which cannot be read (No such file or directory): give"),
        ((fox_tiny, binary), 2, "which is no text in UTF-8: give another file."),
        ((fox_tiny, text, "--output", tmp_path), 2, "give a file in a folder that exists."),
        ((fox_tiny, text, "--output", tmp_path / "no" / "map.html"), 2, "give a file in a folder that exists."),
        ((fox_tiny, text, "--from", "guess"), 2, "--from is guess: give one of transformers, engine."),
        ((fox_tiny, text, "--page-size", "17"), 2, "--page-size is 17: give one of 16, 32, 64, 128, 256."),
        ((fox_tiny, text, "--max-tokens", "0"), 2, "--max-tokens is 0: give a whole number from 1"),
        ((fox_tiny, text, "--dtype", "int8"), 2, "--dtype is int8"),
        ((text, text), 2, "which is a file: give the folder that it is in."),
        ((tmp_path, text), 1, "config.json is missing: give the folder of a checkpoint"),
        (
            (fox_tiny, empty, "--output", tmp_path / "map.html"),
            1,
            "TEXT is empty: give a text of at least one token.",
        ),
        ((broken, text, "--output", tmp_path / "map.html"), 1, "has no .safetensors file"),
    ):
        done = run("map", *words)
        assert (done.code, done.out) == (code, ""), done.err
        assert part in done.err and done.err.count("\n") == 1 and done.err.endswith(".\n"), done.err
    assert not list(tmp_path.rglob("*.html"))
