"""docs/architecture.md says which module uses which of vLLM's interfaces; here that is held against the code."""

from __future__ import annotations

import ast
import re

from tests.support import ROOT


def interfaces() -> set[tuple[str, str]]:
    """Every (interface of vLLM, module that imports it), also for type checking only."""
    found = set()
    for path in (ROOT / "vllm_fox").rglob("*.py"):
        module = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "vllm":
                found |= {(f"{node.module}.{alias.name}", module) for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {(alias.name, module) for alias in node.names if alias.name.split(".")[0] == "vllm"}
    return found


def test_the_table_of_vllms_interfaces_is_complete() -> None:
    """What the next release of vLLM changed of these is what has to be adapted, and where."""
    table = (ROOT / "docs" / "architecture.md").read_text().split("## vLLM's interfaces")[1].split("\n## ")[0]
    listed = set()
    for name, modules in re.findall(r"^\| `(vllm[\w.]*)` \| (.*) \|$", table, re.MULTILINE):
        listed |= {(name, module) for module in re.findall(r"`(vllm_fox/[\w/]+\.py)`", modules)}
    assert listed == interfaces()
