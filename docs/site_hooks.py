"""What the documentation site needs besides the pages of docs/ (MkDocs calls these functions).

The README becomes its first page. Links to files that are no part of the site become the files' names, because they
lead somewhere on a checkout only.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add README.md as the page index.md."""
    text = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=_relinked(text, PurePosixPath())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/."""
    if page.file.src_uri == "index.md":
        return markdown
    return _relinked(markdown, PurePosixPath("docs", page.file.src_uri).parent)


def _relinked(markdown: str, folder: PurePosixPath) -> str:
    """The text of a file of a folder of the checkout, with links for the site."""

    def replace(match: re.Match[str]) -> str:
        image, target, anchor = match[1], match[3], match[4] or ""
        text = LINK.sub(replace, match[2])  # an image may be a link
        if not target or "://" in target:
            return match[0]
        path = _normal(folder / target)
        if path == PurePosixPath("README.md"):
            here = "index.md"
        elif path.parts[:1] == ("docs",) and (ROOT / path).is_file():
            here = str(PurePosixPath(*path.parts[1:]))
        else:
            return text if str(path) in text else f"{text} (`{path}`)"
        up = "../" * (len(folder.parts) - 1) if folder.parts else ""
        return f"{image}[{text}]({up}{here}{anchor})"

    return LINK.sub(replace, markdown)


def _normal(path: PurePosixPath) -> PurePosixPath:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return PurePosixPath(*parts)
