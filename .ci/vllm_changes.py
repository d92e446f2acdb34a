"""Print what changed between two installed releases of vLLM in the interfaces that vllm-fox uses.

    python .ci/vllm_changes.py OLD NEW [--bodies]

OLD and NEW are folders that hold a package ``vllm``, such as two ``site-packages``. The interfaces are those of the
table in docs/architecture.md. Both packages are read as source and never imported, so neither has to run here.

For every interface one of these is printed: that it is gone; the signatures, fields, base classes and members that
differ; or that only code behind an unchanged signature differs, which ``--bodies`` names. The exit code is 1 if any
interface is gone or has another signature, else 0.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).parents[1] / "docs" / "architecture.md"
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Assign | ast.AnnAssign | ast.Module


def listed(table: Path = TABLE) -> dict[str, list[str]]:
    """Every interface of vLLM in the table of ``table``, with the modules of vllm-fox that use it."""
    section = table.read_text().split("## vLLM's interfaces")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(vllm[\w.]*)` \| (.*) \|$", section, re.MULTILINE)
    return {name: re.findall(r"`(vllm_fox/[\w/]+\.py)`", modules) for name, modules in rows}


class Release:
    """The source of one installed vLLM, under ``site``."""

    def __init__(self, site: Path) -> None:
        self.site = site
        if self.path("vllm") is None:
            raise SystemExit(f"vllm_changes: {site} holds no package vllm: give a folder such as site-packages.")

    def path(self, module: str) -> Path | None:
        base = self.site.joinpath(*module.split("."))
        return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)

    def find(self, name: str, seen: frozenset[str] = frozenset()) -> Definition | None:
        """The definition that the dotted ``name`` stands for, through any number of re-exports; None if gone."""
        path = self.path(name)
        if path is not None:
            return ast.parse(path.read_text())
        module, _, attribute = name.rpartition(".")
        path = self.path(module) if module else None
        if path is None or name in seen:
            return None
        elsewhere: list[str] = []
        for node in statements(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == attribute:
                return node
            if isinstance(node, ast.Assign | ast.AnnAssign) and attribute in targets(node):
                return node
            if isinstance(node, ast.ImportFrom):
                start = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                start = start[: len(start) - node.level + 1] if node.level else []
                source = ".".join([*start, *([node.module] if node.module else [])])
                for alias in node.names:
                    if (alias.asname or alias.name) == attribute:
                        elsewhere.append(f"{source}.{alias.name}")
                    elif alias.name == "*":
                        elsewhere.append(f"{source}.{attribute}")
        found = (self.find(other, seen | {name}) for other in elsewhere if other.startswith("vllm"))
        return next((definition for definition in found if definition is not None), None)


def statements(module: ast.Module) -> Iterator[ast.stmt]:
    """The module's own statements, also those under ``if`` and ``try``."""
    for node in module.body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from (child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node)


def targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in found if isinstance(target, ast.Name)]


def without_docstrings(node: ast.AST) -> ast.AST:
    for child in ast.walk(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            first = child.body[0] if child.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                child.body = child.body[1:] or [ast.Pass()]
    return node


def shape(node: ast.stmt | Definition) -> str:
    """What a caller or a subclass depends on: decorators, arguments, annotations and defaults; no code."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        decorators = "".join(f"@{ast.unparse(decorator)} " for decorator in node.decorator_list)
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"{decorators}{kind} {node.name}({ast.unparse(node.args)}){returns}"
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}({', '.join(map(ast.unparse, [*node.bases, *node.keywords]))})"
    return ast.unparse(node)


def entries(node: ast.stmt | Definition) -> dict[str, str] | None:
    """Entries of a module's or a class's dict literal, by key; None for everything else."""
    if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
        return {
            ast.unparse(key): ast.unparse(value) for key, value in zip(node.value.keys, node.value.values) if key
        }
    return None


def differences(old: ast.stmt | Definition | None, new: ast.stmt | Definition | None) -> list[str]:
    """Lines for what is gone (-) and what is new (+); of dicts only for the entries that differ."""
    before, after = (entries(node) if node is not None else None for node in (old, new))
    if before is not None and after is not None:
        return [
            f"{sign} {key}: {one[key]}"
            for sign, one, other in (("-", before, after), ("+", after, before))
            for key in one
            if other.get(key) != one[key]
        ]
    return [f"{sign} {shape(node)}" for sign, node in (("-", old), ("+", new)) if node is not None]


def members(node: Definition) -> dict[str, ast.stmt]:
    """Methods and fields of a class, by name. Of a module, which is used by its attributes, all of its names."""
    found: dict[str, ast.stmt] = {}
    if isinstance(node, ast.ClassDef | ast.Module):
        for child in node.body if isinstance(node, ast.ClassDef) else statements(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found[child.name] = child
            elif isinstance(child, ast.Assign | ast.AnnAssign):
                found |= dict.fromkeys(targets(child), child)
    return found


def compare(old: Definition, new: Definition) -> tuple[list[str], list[str]]:
    """What differs for a caller or a subclass, and the names of what differs only in its code."""
    shapes, bodies = [], []
    if not isinstance(old, ast.Module) and shape(old) != shape(new):
        shapes += differences(old, new)
    elif isinstance(old, ast.FunctionDef) and ast.dump(without_docstrings(old)) != ast.dump(
        without_docstrings(new)
    ):
        bodies.append(old.name)
    before, after = members(old), members(new)
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one is not None and other is not None and shape(one) == shape(other):
            if ast.dump(without_docstrings(one)) != ast.dump(without_docstrings(other)):
                bodies.append(name)
            continue
        shapes += differences(one, other)
    return shapes, bodies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="folder with the release that is supported")
    parser.add_argument("new", type=Path, help="folder with the release to take in")
    parser.add_argument("--bodies", action="store_true", help="name also what changed only in its code")
    arguments = parser.parse_args()
    before, after = Release(arguments.old), Release(arguments.new)
    changed = 0
    for name, users in listed().items():
        one, other = before.find(name), after.find(name)
        if one is None:
            print(f"{name}\n    is not in {arguments.old}: the table does not fit that release")
            changed += 1
            continue
        if other is None:
            print(f"{name}\n    is gone; used by {', '.join(users)}")
            changed += 1
            continue
        shapes, bodies = compare(one, other)
        if shapes:
            changed += 1
            print(f"{name}\n    used by {', '.join(users)}")
            print("".join(f"    {line}\n" for line in shapes), end="")
        if bodies and arguments.bodies:
            print(f"{name}\n    only code: {', '.join(bodies)}")
    print(f"{changed} of {len(listed())} interfaces are gone or have another signature.")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
