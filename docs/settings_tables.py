"""The tables of docs/settings.md, made from the settings classes' fields, descriptions, defaults and docstrings.

The site is built without torch, which the package of a family imports. So a family's file is read alone.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm_fox.settings import PageSettings

ROOT = Path(__file__).parent.parent


def tables() -> str:
    """Return the page's sections: the settings of every family, then those of each family that has more."""
    families = [_family(path) for path in sorted((ROOT / "vllm_fox" / "families").glob("*/__init__.py"))]
    page_sizes = "; ".join(f"{one['name']}: {one['page_size']}" for one in families)
    parts = ["## Of every family", _table(PageSettings, PageSettings.model_fields, page_sizes)]
    for one in families:
        if "settings" in one:
            own = _class_of(one["folder"] / "settings.py", one["settings"])
            fields = [name for name in own.model_fields if name not in PageSettings.model_fields]
            parts += [f"## Of {one['name']}", _table(own, fields, page_sizes)]
    return "\n\n".join(parts)


def _family(path: Path) -> dict[str, Any]:
    """What a family's record says: its name, its page size, and the name of its settings' class if it has one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Family":
            given = {one.arg: one.value for one in node.keywords}
            found = {name: ast.literal_eval(given[name]) for name in ("name", "page_size")}
            if isinstance(given.get("settings"), ast.Name):
                found["settings"] = given["settings"].id
            return {**found, "folder": path.parent}
    raise ValueError(f"{path} makes no Family.")


def _class_of(path: Path, name: str) -> type[PageSettings]:
    """A class of settings. Its file is run without what it imports from the kernels, which only methods need."""
    tree = ast.parse(path.read_text())
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_fox.kernels"))
    ]
    module = ModuleType(f"settings_of_{path.parent.name}")
    sys.modules[module.__name__] = module  # where pydantic looks annotations up
    exec(compile(tree, str(path), "exec"), vars(module))
    return getattr(module, name)


def _table(settings: type[PageSettings], fields: Iterable[str], page_sizes: str) -> str:
    meanings = dict(_meanings(settings))
    rows = ["| setting | values | default | what it does |", "|---|---|---|---|"]
    for name in fields:
        field = settings.model_fields[name]
        default = page_sizes if name == "page_size" else _written(field.default)
        meaning = meanings[name]
        meaning = re.sub(r"\bNone\b", "`null`", meaning[0].upper() + meaning[1:])
        rows.append(f"| `{name}` | {field.description} | {default} | {meaning} |")
    return "\n".join(rows)


def _meanings(settings: type[PageSettings]) -> Iterator[tuple[str, str]]:
    """Names and descriptions of a docstring's section "Attributes"."""
    section = inspect.cleandoc(settings.__doc__ or "").split("Attributes:\n")[1]
    for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        yield name, " ".join(text.split())


def _written(default: object) -> str:
    """A default as JSON, or in words where no JSON stands for it."""
    return str(default.value) if isinstance(default, Enum) else f"`{json.dumps(default)}`"
