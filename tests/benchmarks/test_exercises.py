"""Exercises whose answers lie far back in a text."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest

from benchmarks import exercises


@pytest.mark.parametrize("name", exercises.TASKS)
def test_a_task_has_its_answer_in_a_prompt_of_the_length_asked_for(name: str) -> None:
    def words(text: str) -> int:
        return len(text.split())

    for seed in range(5):
        prompt, answer = exercises.TASKS[name](random.Random(seed), words, 800)
        assert 700 < words(prompt) <= 830
        assert answer.strip() in prompt and not prompt.endswith(answer)


def test_exercises_ask_for_what_was_said_before() -> None:
    """Every question of a document repeats a fact that stands before it, and the facts of a name agree."""
    text = exercises.document(random.Random(3), 30000)
    said: dict[str, str] = {}
    repeated = 0
    for name, number in re.findall(r"The (?:number of |secret )?(\w+)(?: number)? is (\d{5})\. ", text):
        repeated += name in said
        assert said.setdefault(name, number) == number
    assert repeated > 20 and len(text) >= 30000
    handed = re.search(r"The value of (\w+) is (\d{5})\. ", text)
    assert handed is not None
    name = handed[1]
    before = text[: handed.start()]
    while (found := re.search(rf"\b{name} = (\w+)\. ", before)) is not None and not found[1].isdigit():
        name = found[1]
    assert found is not None and found[1] == handed[2]


def test_revisions_repeat_passages_that_stood_before() -> None:
    """Most lines of a document stand in it more than once, some are changed, and its passages are of the texts."""
    texts = ["\n".join(f"line {n} of text number {seed}" for n in range(300)) for seed in range(3)]
    text = exercises.revisions(random.Random(4), texts, 40000)
    lines = [line for line in text.split("\n") if re.fullmatch(r"line \d+ of text number \d", line)]
    assert 40000 <= len(text) < 50000
    assert len(lines) > 1.8 * len(set(lines)) and set(lines) <= {line for one in texts for line in one.split("\n")}
    assert re.search(r"_(amber|birch|cedar|delta|ember|fjord|grove|heron|ivory|jade|koala|lotus)\b", text)
    assert text == exercises.revisions(random.Random(4), texts, 40000)


def test_the_program_writes_either_kind(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (("exercises", []), ("revisions", ["--texts", str(text)])):
        command = ["exercises", str(tmp_path / name), *words, "--documents", "3", "--characters", "900"]
        monkeypatch.setattr(sys, "argv", command)
        exercises.main()
        written = [path.read_text() for path in sorted((tmp_path / name).iterdir())]
        assert len(set(written)) == 3 and min(map(len, written)) >= 900
    assert "The secret number" not in "".join(written)
