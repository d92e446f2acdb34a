"""What the documentation site needs besides the pages of docs/ (MkDocs calls these functions).

The README becomes its first page. Links to files that are no part of the site become the files' names, because they
lead somewhere on a checkout only. The page of the settings gets its tables.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SETTINGS = "<!-- settings -->"
"""Stands in docs/settings.md where the tables belong."""
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")
LOADED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]*)""")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add README.md as the page index.md."""
    text = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=_relinked(text, PurePosixPath())))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of docs/, and put in the tables of the settings."""
    if page.file.src_uri == "index.md":
        return markdown
    if SETTINGS in markdown:
        markdown = markdown.replace(SETTINGS, _settings_tables())
    return _relinked(markdown, PurePosixPath("docs", page.file.src_uri).parent)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of names in docstrings, which are Sphinx's: ``:func:`name``` becomes the name as code."""
    return ROLE.sub("", html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from elsewhere when it is read.

    Raises:
        PluginError: it would. MkDocs ends the build with the message.
    """
    if (found := LOADED.search(output)) is not None:
        raise PluginError(f"{page.file.src_uri} loads {found[1]} when it is read: put a copy into docs/.")
    return output


def _settings_tables() -> str:
    # MkDocs runs this file without its folder on the path.
    spec = importlib.util.spec_from_file_location("settings_tables", ROOT / "docs" / "settings_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables: str = module.tables()
    return tables


def _relinked(markdown: str, folder: PurePosixPath) -> str:
    """The text of a file of a folder of the checkout, with links for the site."""

    def replace(match: re.Match[str]) -> str:
        image, target, anchor = match[1], match[3], match[4] or ""
        text = LINK.sub(replace, match[2])  # an image may be a link
        if not target or "://" in target:
            return match[0]
        path = _normal(folder / target)
        if not (ROOT / path).exists():
            return match[0]  # MkDocs says that it leads nowhere
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
