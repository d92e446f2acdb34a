"""Shell commands in pages of Markdown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

PROGRAMS = (
    *(
        "accelerate",
        "apt-get",
        "bash",
        "curl",
        "docker",
        "git",
        "helm",
        "hf",
        "kubectl",
        "make",
        "nsys",
        "pip",
        "pipx",
    ),
    *(
        "pytest",
        "python",
        "python3",
        "ray",
        "sh",
        "sha256sum",
        "torchrun",
        "uv",
        "vllm",
        "vllm-fox",
        "wget",
        "examples/serve.sh",
    ),
    *(".ci/run", ".ci/setup.sh", ".venv-release/bin/twine"),
)
"""What a line must begin with to be a command, unless it begins with a dollar sign."""
START = re.compile(rf"(?:\w+=\S+ +)*(?:{'|'.join(map(re.escape, PROGRAMS))})(?= |$)")
WITH_COMMANDS = {
    *("accelerate", "apt-get", "git", "hf", "make", "pip", "pipx", "ray", "vllm", "vllm-fox"),
    ".venv-release/bin/twine",
}
"""Programs whose first argument says what is done."""


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        text: the command as it is written, without what stands around it.
        program: what is run, such as ``python -m benchmarks.chat``, ``vllm serve`` or ``make demo``.
        arguments: what stands behind that, in words.
    """

    text: str
    program: str
    arguments: tuple[str, ...]


def commands_in(markdown: str) -> Iterator[Command]:
    """Yield the commands of a page: in blocks of code other than Python, and in code within sentences."""
    for text in (*_in_blocks(markdown), *_in_sentences(markdown)):
        try:
            words = shlex.split(text, comments=True)
        except ValueError:  # an apostrophe in what a program printed, or in a comment
            words = text.partition(" #")[0].split()
        for part in _split(words):
            yield _command(text, part)


def _in_blocks(markdown: str) -> Iterator[str]:
    fence, block = None, ""
    for line in markdown.splitlines():
        if line.startswith("```"):
            fence = None if fence is not None else line[3:]
            continue
        inside = line.startswith("    ") if fence is None else fence in ("", "bash", "console", "sh", "shell")
        if not inside:
            continue
        code = block + line.strip()
        if code.startswith("$ "):
            code = code[2:]
        elif not START.match(code):
            continue
        block = code[:-1] if code.endswith("\\") else ""
        if not block:
            yield code


def _in_sentences(markdown: str) -> Iterator[str]:
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose):
        code = " ".join(span.split())
        if START.match(code) and code not in PROGRAMS:
            yield code


def _split(words: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    for word in words:
        if word in ("&&", "|", ";", "||"):
            yield part
            part = []
        else:
            part.append(word)
    yield part


def _command(text: str, words: list[str]) -> Command:
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    count = 1
    if words[0] in ("python", "python3"):
        words = [word for word in words if word != "-P"]
        count = 3 if words[1:2] == ["-m"] else 2
    elif words[0] == "torchrun":
        count = next(n for n, word in enumerate(words) if word.endswith(".py")) + 1
        return Command(text, f"torchrun {words[count - 1]}", tuple(words[count:]))
    elif words[0] in WITH_COMMANDS:
        count = 2
    return Command(text, " ".join(words[:count]), tuple(words[count:]))
