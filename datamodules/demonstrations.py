"""Written rollouts as files: a row becomes a Demonstration and back, and searches that nobody has run yet are run.

A row is {id, question, golden_answers, turns, siblings}. A turn is {kind, text}, or [kind, text]; an observation is a
text as the protocol writes it, a list of passages, which the protocol of a run writes, or left out: then its query is
searched while the file is read. Invariant: behind this file every turn of a demonstration is there and in order.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sdsearch_lightning.datamodules.readers import parse_question, some_rows, source_of
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.files import written_whole
from sdsearch_lightning.protocol import PROTOCOLS
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.retrieval.batched import search_all
from sdsearch_lightning.retrieval.corpus import parse_passage
from sdsearch_lightning.types import Demonstration, Label, Passage, SiblingRecord, SpanKind

Turn = tuple[SpanKind, str | tuple[Passage, ...]]

TAGS = tuple(dict.fromkeys(tag for protocol in PROTOCOLS.values() for tag in protocol().tags))  # type: ignore[call-arg]
"""Tags of the protocols that have a name: what no query may hold, where a run's own protocol is not known."""
SUFFIXES = (".jsonl", ".jsonl.gz")
"""Of files that `write_demonstrations` writes."""
_KINDS = tuple(kind for kind in SpanKind if kind not in (SpanKind.PROMPT, SpanKind.SCAFFOLD))


def read_demonstrations(
    path: str | Path,
    limit: int | None = None,
    retriever: Retriever | None = None,
    top_k: int = 3,
    tags: Sequence[str] = TAGS,
) -> list[Demonstration]:
    """The demonstrations of a file, in order.

    Args:
        path: .jsonl, .jsonl.gz or .parquet.
        limit: read at most this many rows.
        retriever: searches the queries that no observation follows: each once, 256 at a time.
        top_k: passages that such a query shows.
        tags: of the protocol; a query that holds one is refused, and a refine turn where there is no tag for it.

    Raises:
        DataError: as `read_questions`; turns or siblings of another form, or in an order that no rollout has; or a
            query without observation where there is no retriever. File and row are named.
        RetrievalError: a search failed.
    """
    source, shown, asked = source_of(Path(path)), list[Demonstration](), list[str]()
    for row in some_rows(Path(path), limit):
        shown.append(parse_demonstration(row.values, row.where, source, tags))
        asked += (queries := list(_open_queries(shown[-1].turns)))
        if queries and retriever is None:
            raise DataError(
                f"{row.where}: expected an observation after the query {queries[0]!r}, or a data.retriever that finds "
                "its passages, found neither. Set data.retriever, or write the passages into the file."
            )
    if retriever is None or not asked:
        return shown
    found = search_all(retriever, asked, top_k)
    return [replace(one, turns=tuple(_observed(one.turns, found))) for one in shown]


def parse_demonstration(values: dict[str, Any], where: str, source: str, tags: Sequence[str] = TAGS) -> Demonstration:
    """The demonstration that a row describes, without the observations that it leaves out.

    Args:
        values: the row.
        where: file and row, with which an error begins.
        source: the benchmark, where the row has no `data_source`.
        tags: of the protocol.

    Raises:
        DataError: see `read_demonstrations`.
    """
    question = parse_question(values, where, source)
    turns = tuple(_parse_turn(turn, where) for turn in _expect_list(values, "turns", where))
    siblings = _expect_list(values, "siblings", where, default=[])
    records = tuple(_parse_sibling(sibling, index, where) for index, sibling in enumerate(siblings))
    _check_order(turns, where, tags)
    return Demonstration(question, turns, records)


def row_of(demonstration: Demonstration, with_observations: bool = True) -> dict[str, Any]:
    """The row that reads as `demonstration`; its observations may be left out, to be searched anew when it is read."""
    question = demonstration.question
    return {
        "id": question.id,
        "question": question.text,
        "golden_answers": list(question.answers),
        "turns": [
            {"kind": kind.lower(), "text": content}
            if isinstance(content, str)
            else {"kind": kind.lower(), "passages": [{"id": p.id, "contents": p.contents} for p in content]}
            for kind, content in demonstration.turns
            if with_observations or kind is not SpanKind.OBSERVATION
        ],
        "siblings": [[list(sibling.queries), sibling.label] for sibling in demonstration.siblings],
    }


def write_demonstrations(
    path: str | Path, demonstrations: Iterable[Demonstration], with_observations: bool = True
) -> None:
    """Write a file whole or not at all; the same demonstrations give the same bytes.

    Args:
        path: .jsonl or .jsonl.gz; replaced where it is there.
        demonstrations: written as they come, so that no more than one is needed at a time.
        with_observations: False leaves observations out.

    Raises:
        ConfigError: another suffix.
    """
    path = check_suffix(path)
    with written_whole(path) as draft, draft.open("wb") as plain:
        packed = gzip.GzipFile("", "wb", fileobj=plain, mtime=0) if path.suffix == ".gz" else None
        for demonstration in demonstrations:
            line = json.dumps(row_of(demonstration, with_observations), ensure_ascii=False) + "\n"
            (packed or plain).write(line.encode())
        if packed is not None:
            packed.close()


def check_suffix(path: str | Path) -> Path:
    """The path itself.

    Raises:
        ConfigError: `write_demonstrations` writes no such file.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise ConfigError(f"output: expected a file that ends in {' or '.join(SUFFIXES)}, found {path.name!r}.")
    return path


def query_fault(query: str, tags: Sequence[str] = TAGS) -> str | None:
    """Why no rollout could search `query`, in words; None where one could."""
    if not query.strip():
        return "expected a query with some text in it, found none"
    tag = next((tag for tag in tags if tag in query), None)
    return None if tag is None else f"expected a query without tags of the protocol, found {tag} in {query!r}"


def _open_queries(turns: Sequence[Turn]) -> Iterator[str]:
    """Queries that no observation follows, as a rollout would search them."""
    for (kind, query), (following, _) in pairwise(turns):
        if kind is SpanKind.QUERY and following is not SpanKind.OBSERVATION:
            yield str(query).strip()


def _observed(turns: Sequence[Turn], found: Mapping[str, tuple[Passage, ...]]) -> Iterator[Turn]:
    for (kind, content), (following, _) in pairwise((*turns, turns[-1])):
        yield kind, content
        if kind is SpanKind.QUERY and following is not SpanKind.OBSERVATION:
            yield SpanKind.OBSERVATION, found[str(content).strip()]


def _check_order(turns: Sequence[Turn], where: str, tags: Sequence[str]) -> None:
    """Raises where no rollout has such turns: the answer ends one, and an observation answers a query."""
    kinds = [kind for kind, _ in turns]
    if kinds.count(SpanKind.ANSWER) != 1 or kinds[-1] is not SpanKind.ANSWER:
        found = ", ".join(kinds) or "none"
        raise DataError(f"{where}: expected turns with one answer, which ends them, found {found}.")
    for before, (kind, content) in zip((None, *kinds), turns, strict=False):
        if kind is SpanKind.OBSERVATION and before is not SpanKind.QUERY:
            raise DataError(f"{where}: expected a query before an observation, found {before or 'nothing'}.")
        if kind is SpanKind.REFINE and "<refine>" not in tags:
            raise DataError(
                f"{where}: expected a model.protocol with a refine tag, since the row has a refine turn, found none."
            )
        if kind is SpanKind.QUERY and (fault := query_fault(str(content), tags)):
            raise DataError(f"{where}: {fault}.")


def _expect_list(values: dict[str, Any], key: str, where: str, default: list[Any] | None = None) -> list[Any]:
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list under '{key}', found {value!r}.")
    return value


def _parse_turn(turn: object, where: str) -> Turn:
    match turn:
        case {"kind": str(kind), "passages": [*content]} | {"kind": str(kind), "text": content} | [str(kind), content]:
            if kind.upper() in _KINDS and isinstance(content, str):
                return SpanKind(kind), content
            if kind.upper() == SpanKind.OBSERVATION and isinstance(content, list):
                return SpanKind.OBSERVATION, tuple(_parse_passage(p, index, where) for index, p in enumerate(content))
    raise DataError(
        f"{where}: expected turns of the form [kind, text] or {{kind, text}} with a kind of {', '.join(_KINDS)} (an "
        f"observation may have a list of passages in place of its text), found {turn!r:.120}."
    )


def _parse_passage(passage: object, index: int, where: str) -> Passage:
    if isinstance(passage, str):
        return Passage(str(index), passage)
    if isinstance(passage, dict):
        return parse_passage(passage, where)
    raise DataError(f"{where}: expected passages as texts or {{id, contents}}, found {passage!r:.120}.")


def _parse_sibling(sibling: object, index: int, where: str) -> SiblingRecord:
    match sibling:
        case {"queries": [*queries], "label": str(label)} | [[*queries], str(label)] if (
            label.upper() in Label.__members__
        ):
            texts = tuple(query for query in queries if isinstance(query, str))
            if len(texts) == len(queries):
                return SiblingRecord(index, texts, Label(label))
    raise DataError(
        f"{where}: expected siblings of the form [[query, ...], label] with CORRECT or INCORRECT, found {sibling!r}."
    )
