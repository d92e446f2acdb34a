"""Write the versions in which the packages that vllm-fox needs are installed here. `make lock` calls it.

    python .ci/lock.py FILE EXTRA...

FILE becomes a file of constraints for pip: a line for each package that vllm-fox with the extras needs, and for all
that those need. Nothing else that happens to be installed is in it. Local versions, such as 2.13.0+cpu, are written
without their local part, because other package indexes have other builds. The first line says for which Python and
which machines the file is; .ci/install.sh compares it with its own.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "vllm-fox"


def pins(extras: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return versions of what the project with ``extras`` needs, by name, and names of what is not installed."""
    found, absent = dict[str, str](), set[str]()
    todo, seen = [(PROJECT, frozenset(extras))], set[tuple[str, frozenset[str]]]()
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            absent.add(name)
            continue
        found[name] = Version(installed.version).public
        for requirement in map(Requirement, installed.requires or []):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*wanted, "")):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    del found[PROJECT]
    return found, sorted(absent)


def main() -> None:
    path, *extras = sys.argv[1:]
    found, absent = pins(extras)
    version = ".".join(platform.python_version_tuple()[:2])
    here = f"Python {version} {platform.system()} {platform.machine()}"
    lines = [f"# {here}", f"# Written by `make lock`: what {PROJECT}[{','.join(extras)}] needs, as installed."]
    lines += [f"{name}=={version}" for name, version in sorted(found.items())]
    Path(path).write_text("\n".join(lines) + "\n")
    missing = f"; not installed, so not pinned: {', '.join(absent)}" if absent else ""
    print(f"lock: {len(found)} packages in {path}{missing}")


if __name__ == "__main__":
    main()
