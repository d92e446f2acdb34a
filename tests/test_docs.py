"""Errors that docs/faq.md quotes, and the pages of the documentation site."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT
from vllm_fox.cli.app import COMMANDS

QUOTES = re.findall(r"^> (.+)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def sources() -> str:
    """All of the package, with strings that are written in several parts joined."""
    code = "\n".join(path.read_text() for path in sorted((ROOT / "vllm_fox").rglob("*.py")))
    return re.sub(r"\"\s*\n\s*f?\"", "", code)


@pytest.mark.parametrize("quote", QUOTES)
def test_an_error_that_is_quoted_is_still_said(quote: str, sources: str) -> None:
    assert all(part in sources for part in quote.split("…"))


def test_every_page_is_in_the_navigation() -> None:
    """And every page that is there exists, or is made from README.md."""
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == pages | {"index.md"} and len(QUOTES) > 5


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(
    r"(?:python(?: -P)? (?:-m (?P<module>[\w.]+)|(?P<script>[\w/.]+\.py))"
    rf"|vllm-fox (?P<command>{'|'.join(COMMANDS)})\b)"
    r"(?P<rest>[^\n`]*(?:\\\n[^\n`]*)*)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def source_of(match: re.Match[str]) -> Path | None:
    """The file of the program that a command in the docs runs; None if it is none of ours."""
    if module := match["module"]:
        if module.split(".")[0] not in ("benchmarks", "vllm_fox", "tests"):
            return None
        path = ROOT / Path(*module.split("."))
        return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if script := match["script"]:
        return ROOT / script
    return ROOT / "vllm_fox" / "cli" / f"{match['command']}.py"


def options_of(path: Path) -> set[str]:
    """Options that a program's source names, and those of modules in the same folder that it imports."""
    code = path.read_text()
    beside = [
        path.with_name(f"{name}.py") for name in re.findall(r"^ *(?:from|import) \.?(?:\w+\.)?(\w+)", code, re.M)
    ]
    code += "".join(one.read_text() for one in beside if one.exists())
    if path.parent.name == "cli":  # typer makes options of parameters
        names = re.findall(r"^    (\w+): Annotated", code, re.M)
        code += "".join(f" --{name.replace('_', '-')} " for name in names)
    return set(OPTION.findall(code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_programs_and_options_that_there_are(page: Path) -> None:
    for match in PROGRAM.finditer(page.read_text()):
        path = source_of(match)
        if path is None:
            continue
        assert path.exists(), match[0]
        rest = re.split(r" -- | \| |[;&#]", match["rest"])[0]
        assert set(OPTION.findall(rest)) <= options_of(path) | {"--help", "--version"}, match[0]


RUN = {
    ".ci/vllm_changes.py": "test_vllm_changes.py",
    "benchmarks/cached_pages.py": "benchmarks/test_cached_pages.py",
    "benchmarks/chat.py": "benchmarks/test_chat.py",
    "benchmarks/checkpoint.py": "benchmarks/test_chat.py",
    "benchmarks/cluster_sim.py": "benchmarks/test_cluster_sim.py",
    "benchmarks/eviction.py": "benchmarks/test_eviction.py",
    "benchmarks/quality.py": "benchmarks/test_quality.py",
    "examples/client.py": "examples/test_offline_and_client.py",
    "examples/finetune_dcp.py": "examples/test_finetune_dcp.py",
    "examples/ray_batch.py": "examples/test_ray.py",
    "examples/retrofit.py": "examples/test_retrofit.py",
    "examples/train_fox.py": "examples/test_train_fox.py",
    "vllm_fox/cli/__main__.py": "cli/test_app.py",
    "vllm_fox/cli/convert.py": "cli/test_convert.py",
    "vllm_fox/cli/doctor.py": "cli/test_doctor.py",
    "vllm_fox/cli/inspect.py": "cli/test_inspect.py",
    "vllm_fox/cli/map.py": "cli/test_map.py",
    "vllm_fox/cli/plan.py": "cli/test_plan.py",
    "vllm_fox/cli/top.py": "cli/test_top.py",
    "vllm_fox/convert.py": "families/evicting/test_convert.py",
}
"""Programs that the docs name, and the tests that run them or what they consist of."""
NOT_RUN = {
    "benchmarks/capacity.py": "a GPU",
    "benchmarks/dcp.py": "a long time",
    "benchmarks/dcp_kernels.py": "a GPU",
    "benchmarks/dcp_serving.py": "a GPU",
    "benchmarks/eviction_kernels.py": "a GPU",
    "benchmarks/kernels.py": "a GPU",
    "benchmarks/live_pages.py": "a checkpoint of the official training code",
    "benchmarks/page_size.py": "a long time",
    "benchmarks/precision.py": "a GPU",
    "benchmarks/scheduler_cost.py": "a quiet machine",
    "benchmarks/serving.py": "a GPU",
    "benchmarks/training.py": "a GPU",
    "examples/ray_serve.py": "Ray Serve on a cluster",
}
"""Programs that the docs name and no test runs, and what continuous integration lacks for them."""


def test_every_program_is_run_by_a_test_or_needs_what_there_is_not() -> None:
    named = {path for page in PAGES for match in PROGRAM.finditer(page.read_text()) if (path := source_of(match))}
    assert {str(path.relative_to(ROOT)) for path in named} == RUN.keys() | NOT_RUN.keys()
    assert not RUN.keys() & NOT_RUN.keys()
    for test in RUN.values():
        assert (ROOT / "tests" / test).exists(), test
