"""File formats: a file becomes questions or demonstrations, or an error that names the file and the line.

A format has two halves that know nothing of each other: `_ROWS` opens a file by its suffix, and the `parse_` functions
read the keys of one row. A new suffix is a line in the one, a new shape of rows a branch in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.retrieval.jsonl import Row, read_jsonl
from sdsearch_lightning.types import Demonstration, Label, Question, SiblingRecord, SpanKind

_ROWS: dict[str, Callable[[Path], Iterator[Row]]] = {".jsonl": read_jsonl, ".jsonl.gz": read_jsonl}
_TURN_KINDS = tuple(kind for kind in SpanKind if kind not in (SpanKind.PROMPT, SpanKind.SCAFFOLD))


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, in order: rows {id, question, golden_answers} (FlashRAG) or {question, answers}.

    Args:
        path: .jsonl or .jsonl.gz.
        limit: read at most this many rows.

    Raises:
        DataError: a missing file, an unknown suffix, no rows, or a row without question or answers.
    """
    source = Path(Path(path).name.removesuffix(".gz")).stem
    return [parse_question(row.values, row.where, source) for row in _read_rows(Path(path), limit)]


def read_demonstrations(path: str | Path, limit: int | None = None) -> list[Demonstration]:
    """The demonstrations of a file, in order: rows {question, answers, turns: [[kind, text], ...]}.

    Where the prompt is to hold a hindsight block, a row has {siblings: [[[query, ...], label], ...]} too.

    Raises:
        DataError: as `read_questions`, or turns or siblings of another form.
    """
    source = Path(Path(path).name.removesuffix(".gz")).stem
    return [
        Demonstration(
            parse_question(row.values, row.where, source),
            tuple(_parse_turn(turn, row.where) for turn in _expect_list(row, "turns")),
            tuple(
                _parse_sibling(sibling, index, row.where)
                for index, sibling in enumerate(_expect_list(row, "siblings", default=[]))
            ),
        )
        for row in _read_rows(Path(path), limit)
    ]


def parse_question(values: dict[str, Any], where: str, source: str) -> Question:
    """The question that a row describes. Ids need not be unique: groups are keyed by instance_id, never by them.

    Args:
        values: the row.
        where: file and line, with which an error begins.
        source: the benchmark, where the row has no `data_source`.
    """
    text = values.get("question")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: expected a text under 'question', found {text!r}. The row has {sorted(values)}.")
    key = "golden_answers" if "golden_answers" in values else "answers"
    gold = values.get(key)
    texts = [gold] if isinstance(gold, str) else gold if isinstance(gold, list) else []
    answers = tuple(text for text in texts if isinstance(text, str) and text.strip())
    if not answers or not all(isinstance(text, str) for text in texts):
        raise DataError(
            f"{where}: expected a non-empty list under '{key}', found {gold!r}. "
            "Every question needs at least one gold answer."
        )
    source = str(values.get("data_source", source))
    identity = values.get("id", where.rpartition(" ")[2])  # without one, its line
    return Question(str(identity), text, answers, source)


def _read_rows(path: Path, limit: int | None) -> Iterator[Row]:
    reader = next((read for suffix, read in _ROWS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise DataError(f"{path}: expected a file that ends in {' or '.join(_ROWS)}, found {path.name!r}.")
    row = None
    for row in islice(reader(path), limit):
        yield row
    if row is None:
        raise DataError(f"{path}: expected at least one row, found an empty file.")


def _expect_list(row: Row, key: str, default: list[Any] | None = None) -> list[Any]:
    value = row.values.get(key, default)
    if not isinstance(value, list):
        raise DataError(f"{row.where}: expected a list under '{key}', found {value!r}.")
    return value


def _parse_turn(turn: object, where: str) -> tuple[SpanKind, str]:
    match turn:
        case [str(kind), str(text)] if kind.upper() in _TURN_KINDS:
            return SpanKind(kind), text
    kinds = ", ".join(_TURN_KINDS)
    raise DataError(f"{where}: expected turns of the form [kind, text] with a kind of {kinds}, found {turn!r}.")


def _parse_sibling(sibling: object, index: int, where: str) -> SiblingRecord:
    match sibling:
        case [[*queries], str(label)] if label.upper() in Label.__members__:
            texts = tuple(query for query in queries if isinstance(query, str))
            if len(texts) == len(queries):
                return SiblingRecord(index, texts, Label(label))
    raise DataError(
        f"{where}: expected siblings of the form [[query, ...], label] with CORRECT or INCORRECT, found {sibling!r}."
    )
