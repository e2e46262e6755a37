"""What MkDocs cannot do by itself: pages from the root of the repository, and links that lead there. See mkdocs.yml."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"README.md": "index.md", "cache_schema.md": "cache_schema.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Where the site has the pages of the root."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for source, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links within the repository into links within the site; what the site does not have is only named."""
    uri: str = page.file.src_uri
    source = {uri: source for source, uri in ROOT_PAGES.items()}.get(uri, f"docs/{uri}")

    def within_site(link: re.Match[str]) -> str:
        label, path, anchor = link.groups(default="")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target not in ROOT_PAGES and not target.startswith("docs/"):
            return label
        found = ROOT_PAGES.get(target, target.removeprefix("docs/"))
        return f"[{label}]({posixpath.relpath(found, posixpath.dirname(uri) or '.')}{anchor})"

    return re.sub(r"\[([^\]]*)\]\((?!https?://)([^)\s#]+)(#[^)\s]*)?\)", within_site, markdown)
