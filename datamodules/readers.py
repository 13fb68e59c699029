"""Shapes of rows: a file becomes questions, or an error that names the file and the row.

A question's row is FlashRAG's {id, question, golden_answers}, the plain {question, answers}, or one that Search-R1,
verl or SkyRL wrote, where text and answers may lie deeper. `columns` names the places in files of any other shape, and
the one of supporting passages, which is read only where it is named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdsearch_lightning.datamodules.sources import SPLITS
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval.jsonl import Row
from sdsearch_lightning.retrieval.rows import read_rows
from sdsearch_lightning.types import Question

COLUMNS = ("question", "answers", "id", "source", "support")
"""What `columns` may map to a column of a file."""

_ANSWERS = ("golden_answers", "answers", "reward_model.ground_truth", "reward_spec.ground_truth", "ground_truth")
_INSTRUCTIONS = re.compile(r"(?:(?:.|\n)*?[.!?\n]\s*)?Question: ")
"""What stands before a question, which begins a sentence: a question may quote "Question: " itself."""
_INTO_LIST = re.compile(r"\.-?\d+(\.|$)")
_BULKY = ("metadata",)  # ten paragraphs per question in HotpotQA's files, and nothing that is read here


def read_questions(
    path: str | Path,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    need_answers: bool = True,
) -> list[Question]:
    """The questions of a file, in order.

    Args:
        path: .jsonl, .jsonl.gz or .parquet.
        limit: read at most this many rows.
        columns: names of the file's own columns, see `parse_question`.
        source: what rows without a `data_source` belong to; by default the file's name, or the folder's where the file
            is called like a split.
        need_answers: refuse a row without gold answers; else its question has none.

    Raises:
        DataError: a missing file, an unknown suffix, no rows, or a row without question or answers.
    """
    columns = check_columns(columns)
    without = () if any(name.split(".")[0] in _BULKY for name in columns.values()) else _BULKY
    return [question for _, question in question_rows(path, limit, columns, source, need_answers, without)]


def question_rows(
    path: str | Path,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    need_answers: bool = True,
    without: tuple[str, ...] = (),
) -> Iterator[tuple[Row, Question]]:
    """Each row of a file, whole but for the columns of `without`, beside its question; as `read_questions` else."""
    path, columns = Path(path), check_columns(columns)
    source = source or source_of(path)
    for row in some_rows(path, limit, without):
        yield row, parse_question(row.values, row.where, source, columns, need_answers)


def check_columns(columns: Mapping[str, str] | None) -> Mapping[str, str]:
    """The mapping itself, or an empty one.

    Raises:
        ConfigError: it maps something that a question does not have.
    """
    if unknown := set(columns or ()) - set(COLUMNS):
        raise ConfigError(
            f"data.columns: expected keys among {', '.join(COLUMNS)}, found {', '.join(sorted(unknown))}. A key is "
            "what a question needs, its value the column of your file that holds it."
        )
    return columns or {}


def parse_question(
    values: dict[str, Any],
    where: str,
    source: str,
    columns: Mapping[str, str] | None = None,
    need_answers: bool = True,
) -> Question:
    """The question that a row describes. Ids need not be unique: groups are keyed by instance_id, never by them.

    Args:
        values: the row; lists in it may be numpy arrays.
        where: file and row, with which an error begins.
        source: the benchmark, where the row has no `data_source`.
        columns: for each of COLUMNS that lies elsewhere, its column; a dot leads into a nested one, `*` into each
            element of a list. A row may lack that of `support`, as rows of other data sets do.
        need_answers: see `read_questions`.

    Raises:
        DataError: no text, no answers, no column of a name in `columns`, or support of another form.
    """
    columns = columns or {}
    text = _text_of(values, where, columns)
    answers = _answers_of(values, where, columns, need_answers)
    if "source" in columns:
        source = str(_column(values, columns["source"], where))
    elif (found := values.get("data_source")) is not None:
        source = str(found).removeprefix("searchR1_")  # verl's prefix
    if "id" in columns:
        identity = _column(values, columns["id"], where)
    elif (identity := values.get("id")) is None:
        index = _look(values, "extra_info.index")  # restarts at 0 for every source of a file
        identity = where.rpartition(" ")[2] if index is None else f"{source}_{index}"
    support = _support_of(values, where, columns["support"]) if "support" in columns else ()
    return Question(str(identity), text, answers, source, support=support)


def _text_of(values: dict[str, Any], where: str, columns: Mapping[str, str]) -> str:
    if name := columns.get("question"):
        text = _column(values, name, where)
        text = _asked_in(text) if isinstance(text, list) else text
        if isinstance(text, str) and _INTO_LIST.search(name):  # a message of a prompt, which has instructions
            text = _without_instructions(text)
    else:
        text = _look(values, name := "question") or _look(values, "extra_info.question")
        text = text or _asked_in(_look(values, "prompt"))
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            f"{where}: expected a text under '{name}', found {text!r}. The row has {sorted(values)}; data.columns can "
            "name another column."
        )
    return text


def _asked_in(messages: Any) -> str | None:
    """What the last user message asks: all of it, or what stands behind the instructions of Search-R1's template."""
    for message in reversed(messages if isinstance(messages, list) else []):
        match message:
            case {"role": "user", "content": str(content)}:
                return _without_instructions(content)
    return None


def _without_instructions(content: str) -> str:
    instructions = _INSTRUCTIONS.match(content)
    return content[instructions.end() if instructions else 0 :].strip()


def _answers_of(values: dict[str, Any], where: str, columns: Mapping[str, str], need_answers: bool) -> tuple[str, ...]:
    if name := columns.get("answers"):
        gold = _column(values, name, where) if need_answers else _look(values, name)
    else:
        name = next((name for name in _ANSWERS if _look(values, name)), None)
        name = name or next((name for name in _ANSWERS if name in values), "answers")
        gold = _look(values, name)
    found = _unwrapped(gold)
    texts = [_as_text(value) for value in (found if isinstance(found, list) else [found])]
    if any(text is None for text in texts) and found is not None:
        raise DataError(f"{where}: expected texts or numbers under '{name}', found {gold!r}. List each by itself.")
    answers = tuple(text for text in texts if text and text.strip())
    if not answers and need_answers:
        raise DataError(
            f"{where}: expected a non-empty list under '{name}', found {gold!r}. "
            "Every question needs at least one gold answer, but for `predict`."
        )
    return answers


def _unwrapped(gold: Any) -> Any:
    """What stands under `target`, as in Search-R1's files; text that is a JSON list or such an object is read first."""
    if isinstance(gold, str) and gold.lstrip()[:1] in ("[", "{"):
        try:
            read = json.loads(gold)
        except ValueError:
            return gold  # a text that merely begins so
        gold = read if isinstance(read, list) or (isinstance(read, dict) and "target" in read) else gold
    return _look(gold, "target") if isinstance(gold, dict) else gold


def _support_of(values: dict[str, Any], where: str, name: str) -> tuple[str, ...]:
    """Titles or ids of the supporting passages, each once, in the order of the file; none where the row has none."""
    found = _look(values, name)
    items = _unwrapped(found) if isinstance(found, str) else found
    titles = [_title_in(item) for item in (items if isinstance(items, list) else [items])]
    if any(title is None for title in titles):
        raise DataError(
            f"{where}: expected titles or ids of passages under '{name}', as texts, {{title: ...}} or [title, number], "
            f"found {found!r:.80}. data.columns.support names the place: a dot leads deeper, * into each of a list."
        )
    return tuple(dict.fromkeys(title for title in titles if title and title.strip()))


def _title_in(item: Any) -> str | None:
    """What an element of `support` names: a passage, nothing (""), or None where that cannot be told."""
    match item.tolist() if hasattr(item, "tolist") else item:
        case None | {"is_supporting": False}:  # MuSiQue lists all paragraphs of a question
            return ""
        case {"title": title} | ([str(title)] | [str(title), int()]):  # HotpotQA's [title, sentence]
            return _as_text(title)
        case other:
            return _as_text(other)


def _as_text(value: object) -> str | None:
    """An answer, a title or an id as text; None where it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else None


def _look(values: Any, path: str) -> Any:
    """What a row holds in a column, or at a dotted path, whose numbers lead into lists (`prompt.0.content`).

    `*` leads into each element: the rest of the path is looked up in all of them. A numpy array comes back as a list,
    None where there is nothing.
    """
    names = [path] if isinstance(values, dict) and path in values else path.split(".")
    for index, name in enumerate(names):
        if isinstance(values, list) and name == "*":
            rest = ".".join(names[index + 1 :])
            return [_look(value, rest) if rest else value for value in values]
        if isinstance(values, dict):
            values = values.get(name)
        elif isinstance(values, list) and re.fullmatch(r"-?\d+", name) and -len(values) <= int(name) < len(values):
            values = values[int(name)]
        else:
            values = None
        values = values.tolist() if hasattr(values, "tolist") else values
    return values


def _column(values: dict[str, Any], path: str, where: str) -> Any:
    """What a row must hold, since `columns` names it."""
    if (value := _look(values, path)) is None:
        raise DataError(
            f"{where}: expected a value in the column {path!r}, which data.columns names, found none. "
            f"The row has {sorted(values)}."
        )
    return value


def source_of(path: Path) -> str:
    """The file's name, or its folder's where the file is called like a split: nq/test.jsonl is of nq."""
    stem = Path(path.name.removesuffix(".gz")).stem
    is_split = any(re.sub(r"-\d+-of-\d+(-[0-9a-f]+)?$", "", stem) in words for words in SPLITS.values())
    return path.absolute().parent.name if is_split else stem


def some_rows(path: Path, limit: int | None, without: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a file.

    Raises:
        DataError: as `read_rows`, or there is none.
    """
    row = None
    for row in read_rows(path, limit, without):
        yield row
    if row is None:
        raise DataError(f"{path}: expected at least one row, found an empty file.")
