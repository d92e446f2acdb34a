"""What docs/faq.md quotes, the tables of the settings, and the pages of the documentation site."""

from __future__ import annotations

import ast
import importlib.util
import re
from types import ModuleType

import pytest

import vllm_fox.hf
from tests.support import ROOT
from vllm_fox.families import FAMILIES

ENTRIES = (ROOT / "docs" / "faq.md").read_text().split("\n## ")[1:]


@pytest.fixture(scope="module")
def said() -> str:
    """All strings of the package, with … for what is put into them, and all sentences of the docs but the FAQ."""
    texts = []
    for path in sorted(path for folder in ("vllm_fox", "kernels") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value.replace("%s", "…"))
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                texts.append("".join(map(str, parts)))
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts += [page.read_text() for page in pages if page.name != "faq.md"]
    return "\0".join(" ".join(text.split()) for text in texts)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.splitlines()[0])
def test_what_an_entry_of_the_faq_quotes_is_still_said(entry: str, said: str) -> None:
    (quote,) = re.findall(r"^> (.+)$", entry, re.MULTILINE)
    assert quote in said


def test_the_faq_has_a_dozen_entries_or_more() -> None:
    assert len(ENTRIES) >= 12


@pytest.fixture(scope="module")
def settings_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_tables", ROOT / "docs" / "settings_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_of_every_family_is_in_the_tables(settings_tables: ModuleType) -> None:
    """They are made without importing the families; here that is held against the families themselves."""
    text = settings_tables.tables()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| .+ \|$", text, re.MULTILINE)
    fields = {name: field for family in FAMILIES for name, field in family.settings.model_fields.items()}
    assert sorted(name for name, _, _ in rows) == sorted(fields)
    for name, values, default in rows:
        assert values == fields[name].description
        if name == "page_size":
            assert sorted(default.split("; ")) == sorted(f"{one.name}: {one.page_size}" for one in FAMILIES)
    defaults = {name: default for name, _, default in rows}
    assert defaults["release"] == "`true`" and defaults["log_pruning_tolerance"] == "from the checkpoint"


def test_every_page_is_in_the_navigation() -> None:
    """And every page that is there exists, or is made from README.md."""
    named = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == pages | {"index.md"}


def test_the_reference_has_all_leaf_functions_and_models_for_transformers() -> None:
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert set(vllm_fox.hf.__all__) <= {name.rpartition(".")[2] for name in named}
    for path in (ROOT / "kernels").rglob("reference.py"):
        leaf = ".".join(("vllm_fox", *path.parent.relative_to(ROOT).parts))
        assert any(name.startswith(f"{leaf}.") for name in named), leaf


def test_no_table_has_a_row_twice() -> None:
    """Tables are pasted from what benchmarks print."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for part in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            rows = part.splitlines()
            assert [row for row in set(rows) if rows.count(row) > 1] == [], page.relative_to(ROOT)
