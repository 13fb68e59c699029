"""What `make docs` adds to the files of docs/: the pages that lie outside of it, and links that lead there.

On GitHub a link of docs/data.md to `../examples/custom_retriever.py` opens the file. On the site that file is a page of
its own, and README.md is the front page. Links stay as they are written in the files, and are turned here.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RESULTS.md": "benchmarks.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))},
}
"""Files outside of docs/ that are pages: where they lie, and their place on the site."""
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)(?=\))")
"""The target of a link to a file: neither an address nor a place on the same page."""
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def place_of(path: str) -> str:
    """Where a file of the repository stands on the site; "" where it is not there."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else "")


def turned(text: str, path: str) -> str:
    """A page with its links leading to places on the site.

    Args:
        text: of the page.
        path: of its file in the repository, which its links are relative to.
    """

    def turn(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        place = place_of(file)
        # What has no place stays as it is: mkdocs says that it leads nowhere, and `--strict` ends there.
        here = posixpath.dirname(place_of(path))
        return (posixpath.relpath(place, here or ".") if place else match[1]) + (hash_ + anchor if place else "")

    codes: list[str] = []

    def hide(match: re.Match[str]) -> str:
        codes.append(match[0])
        return f"\0{len(codes) - 1}\0"

    shown = LINK.sub(turn, CODE.sub(hide, text))
    return re.sub(r"\0(\d+)\0", lambda match: codes[int(match[1])], shown)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside of docs/."""
    from mkdocs.structure.files import File

    for path, place in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        page = text if path.endswith(".md") else f"# {path}\n\n```python\n{text}```\n"
        files.append(File.generated(config, place, content=page))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the links of a page."""
    place = page.file.src_uri
    outside = {place: path for path, place in PAGES.items()}
    return turned(markdown, outside.get(place, f"docs/{place}"))
