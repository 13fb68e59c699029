"""Files and folders that are there whole or not at all.

Invariant: what has a name that does not begin with a dot was once wholly written; before that it is a draft beside it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def draft_of(path: Path) -> Path:
    """The name that `path` has until it is whole."""
    return path.with_name(f".{path.name}.draft")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A draft to write inside the block; at its end it takes the name `path`, in place of what has it until then.

    After an error there is no draft, and `path` is what it was. A killed process leaves one; the next removes it.

    Args:
        path: of a file, a link or a folder; folders above it are made.
    """
    path = path.absolute()
    draft = draft_of(path)
    remove(draft)
    draft.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        if path.is_dir() and not path.is_symlink():
            remove(path)  # a folder does not replace another
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            remove(draft)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
