"""What can be read off the code: vLLM's interfaces, as docs/architecture.md lists them, and clocks."""

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


def test_no_wall_clock_is_read() -> None:
    """It jumps: whatever is timed is by a clock that only runs forward."""
    wall = {"time", "time_ns", "ctime", "localtime", "gmtime", "strftime", "datetime", "now", "utcnow", "today"}
    read, others = set(), set()
    for path in [*(ROOT / "vllm_fox").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                read |= {(alias.name, path.name) for alias in node.names}
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in ("time", "datetime", "date")
            ):
                (read if node.attr in wall else others).add((node.attr, path.name))
    assert not read
    assert ("monotonic", "metrics.py") in others
