"""Exercises whose answers lie far back in a text, in the manner of RULER (arXiv 2404.06654).

python -m benchmarks.exercises FOLDER [--documents 1000] [--characters 16000]
python -m benchmarks.exercises FOLDER --texts TEXT_FOLDER [--documents 1000] [--characters 16000]

A task makes a prompt of about so many tokens, and its answer: ``python -m benchmarks.quality`` asks them. The
program writes documents of one of two kinds. A small model that is trained on text alone does not learn to look far
back; with a share of these documents among its texts it does.

- exercises: full of facts and questions such as those of the tasks.
- revisions, with ``--texts``: passages of real texts, most of which come again later with changes, as the files of
  a code review do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.options import Parser, find_texts, non_negative_int, positive_int

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SENTENCES = [f"{one.strip()}. " for one in FILLER.split(".") if one.strip()]
NAMES = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "ivory", "jade", "koala", "lotus")
Task = Callable[[random.Random, Callable[[str], int], int], tuple[str, str]]


def _filled(parts: Sequence[str], count: Callable[[str], int], length: int) -> str:
    """The parts in order, with filler before each so that all take about ``length`` tokens."""
    room = max(0, length - count("".join(parts)))
    each = count(FILLER) / len(SENTENCES)
    fill = int(room / each)
    text, said = "", 0
    for number, part in enumerate(parts, 1):
        until = fill * number // (len(parts) + 1)
        text += "".join(SENTENCES[n % len(SENTENCES)] for n in range(said, until)) + part
        said = until
    return text + "".join(SENTENCES[n % len(SENTENCES)] for n in range(said, fill))


def needle(rng: random.Random, count: Callable[[str], int], length: int) -> tuple[str, str]:
    """One number, said once."""
    number = str(rng.randrange(10000, 100000))
    text = _filled([f"The secret number is {number}. "], count, length)
    return f"{text}The secret number is", f" {number}"


def keys(rng: random.Random, count: Callable[[str], int], length: int) -> tuple[str, str]:
    """One of eight numbers, by its name."""
    names = rng.sample(NAMES, 8)
    numbers = [str(rng.randrange(10000, 100000)) for _ in names]
    parts = [f"The number of {name} is {number}. " for name, number in zip(names, numbers, strict=True)]
    asked = rng.randrange(8)
    return f"{_filled(parts, count, length)}The number of {names[asked]} is", f" {numbers[asked]}"


def variables(rng: random.Random, count: Callable[[str], int], length: int) -> tuple[str, str]:
    """A value that is handed on three times."""
    chain = rng.sample(NAMES, 4)
    number = str(rng.randrange(10000, 100000))
    parts = [f"{chain[0]} = {number}. "]
    parts += [f"{new} = {old}. " for old, new in zip(chain, chain[1:], strict=False)]
    return f"{_filled(parts, count, length)}The value of {chain[-1]} is", f" {number}"


def copying(rng: random.Random, count: Callable[[str], int], length: int) -> tuple[str, str]:
    """A line of words, which is to be repeated."""
    words = " ".join(rng.choice(NAMES) for _ in range(12))
    text = _filled([f"Remember this line: {words}. "], count, length)
    return f"{text}Remember this line:", f" {words}"


TASKS: dict[str, Task] = {"needle": needle, "keys": keys, "variables": variables, "copying": copying}


def document(rng: random.Random, characters: int) -> str:
    """A text of about ``characters`` in which facts as those of the tasks are said, and asked for later."""
    secret, handed, *numbers = (rng.randrange(10000, 100000) for _ in range(len(NAMES) + 2))
    facts = [f"The number of {name} is {number}. " for name, number in zip(NAMES, numbers, strict=True)]
    words = " ".join(rng.choice(NAMES) for _ in range(12))
    facts += [f"The secret number is {secret}. ", f"Remember this line: {words}. "]
    chain = rng.sample(NAMES, 4)
    order = [f"{chain[0]} = {handed}. ", *[f"{new} = {old}. " for old, new in zip(chain, chain[1:], strict=False)]]
    rng.shuffle(facts)
    known: list[str] = []
    text, at = "", 0
    while len(text) < characters:
        for _ in range(int(2 ** rng.uniform(0, 6))):
            text, at = text + SENTENCES[at % len(SENTENCES)], at + 1
        kind = rng.random()
        if kind < 0.4 and facts:
            known.append(facts.pop())
            text += known[-1]
        elif kind < 0.5 and order:
            text += order.pop(0)
            if not order:
                known.append(f"The value of {chain[-1]} is {handed}. ")
        elif known:
            text += rng.choice(known)
    return text


AGAIN = 0.65
"""Share of a document's passages that stood before."""
SHORTEST, LONGEST = 60, 4000
"""Characters of a passage."""


def revised(rng: random.Random, passage: str) -> str:
    """A passage with one name changed, and one in thirty lines dropped or doubled."""
    lines = []
    for line in passage.split("\n"):
        chance = rng.random()
        lines += [] if chance < 1 / 60 else [line, line] if chance < 1 / 30 else [line]
    text = "\n".join(lines)
    names = sorted(set(re.findall(r"\b[A-Za-z_]{4,}\b", text)))
    if not names:
        return text
    return re.sub(rf"\b{rng.choice(names)}\b", f"{rng.choice(names)}_{rng.choice(NAMES)}", text)


def revisions(rng: random.Random, texts: Sequence[str], characters: int) -> str:
    """A document of about ``characters``: passages of the texts, of which most come again later, revised."""
    passages: list[str] = []
    parts, length = [], 0
    while length < characters:
        if passages and rng.random() < AGAIN:
            part = revised(rng, rng.choice(passages))
        else:
            source, size = rng.choice(texts), round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())
            start = rng.randrange(max(1, len(source) - size))
            part = source[start : start + size]
            passages.append(part)
        parts.append(part)
        length += len(part) + 2
    return "\n\n".join(parts)


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=positive_int, default=1000)
    parser.add_argument("--characters", type=positive_int, default=16000, help="of a document")
    parser.add_argument("--texts", type=Path, help="folder of text files: write revisions of them")
    parser.add_argument("--seed", type=non_negative_int, default=0)
    args = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in find_texts(args.texts)] if args.texts else []
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    for number in range(args.documents):
        text = revisions(rng, texts, args.characters) if texts else document(rng, args.characters)
        (args.folder / f"{number:06}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
