"""Errors that docs/faq.md quotes, and the pages of the documentation site."""

from __future__ import annotations

import re

import pytest

from tests.support import ROOT

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
