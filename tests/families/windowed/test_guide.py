"""The code of docs/adding_a_family.md is this folder's."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support import ROOT


def test_the_guides_code_is_the_code_that_is_tested() -> None:
    sources = [path.read_text() for path in Path(__file__).parent.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_family.md").read_text(), re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        assert any(block in source for source in sources), block
