"""A corpus of four passages, and what was found in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sdsearch_lightning.types import Passage

FOUR_TEXTS = {
    "paris": '"Paris"\nthe capital of France on the Seine',
    "rome": '"Rome"\nthe capital of Italy on the Tiber',
    "hamlet": '"Hamlet"\na play by Shakespeare',
    "tea": '"Tea"\na drink of leaves',
}


def write_four_texts(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": key, "contents": text}) + "\n" for key, text in FOUR_TEXTS.items()))
    return path


def names_in(folder: Path) -> list[str]:
    """Names of all but the locks."""
    return [path.name for path in folder.iterdir() if path.suffix != ".lock"]


def ids_of(results: Sequence[Sequence[Passage]]) -> list[list[str]]:
    return [[passage.id for passage in found] for found in results]
