"""A hook of mkdocs: the documents of the repository's root become pages of the site, and links between them hold.

In the repository a page of ``docs/`` links to ``../SECURITY.md``, and README.md to ``docs/cli.md``; the site has all of
them in one folder.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

PAGES = {
    "README.md": "overview.md",  # a README.md beside an index.md would stand for it
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<=\]\()(?![\w+.-]+:)[^)#\s]+")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the documents of the root to the pages."""
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page with the links that it needs where it lies in the site."""
    folder = "" if page.file.src_uri in PAGES.values() else "docs"
    return _LINK.sub(lambda link: site_path(link[0], folder), markdown)


def site_path(target: str, folder: str) -> str:
    """Return where a link of a document in ``folder`` of the repository leads in the site."""
    path = posixpath.normpath(posixpath.join(folder, target))
    return PAGES.get(path) or posixpath.relpath(path, "docs")
