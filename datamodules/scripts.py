"""Demonstrations from a script: a generator function of the user's that searches and answers, as a policy should.

    def script(task):
        passages = yield Search("capital of Kenya", thought="I need the capital of Kenya.")
        yield Answer("Nairobi", thought="The answer is Nairobi.")

All questions are asked together: what their scripts want to search next goes to the retriever in batches. Invariant: a
rollout draws from its own numbers (seed, row, sibling), so neither a limit nor a batch changes another row.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

from sdsearch_lightning.datamodules.demonstrations import Turn, query_fault
from sdsearch_lightning.errors import ConfigError, first_line
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.retrieval.batched import search_all
from sdsearch_lightning.retrieval.jsonl import Row
from sdsearch_lightning.retrieval.text import is_whole
from sdsearch_lightning.scoring.rewards import F1LabelRule, LabelRule, exact_match
from sdsearch_lightning.types import (
    Demonstration,
    Label,
    Passage,
    Question,
    SiblingRecord,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)

WINDOW = 1024
"""Questions that are asked together: their passages are in memory until they are answered."""


class _Move:
    def __post_init__(self) -> None:
        for each in fields(self):  # type: ignore[arg-type]
            text = getattr(self, each.name)
            if not isinstance(text, str) or not is_whole(text):
                raise ConfigError(f"{type(self).__name__}: expected text as {each.name}, found {text!a:.60}")


@dataclass(frozen=True, slots=True)
class Search(_Move):
    """A search; what is yielded back is the list of its passages, best first.

    Args:
        query: what is searched, without tags of a protocol.
        thought: what is thought before it, in the same turn.
        refine: what the passages of the search before are summarised to, before the thought (protocols with a refine
            tag).

    Raises:
        ConfigError: the query is empty or holds a tag.
    """

    query: str
    thought: str = ""
    refine: str = ""

    def __post_init__(self) -> None:
        _Move.__post_init__(self)
        if fault := query_fault(self.query):
            raise ConfigError(f"Search: {fault}")


@dataclass(frozen=True, slots=True)
class Answer(_Move):
    """The answer, which ends a rollout; `thought` and `refine` stand before it as in `Search`."""

    text: str
    thought: str = ""
    refine: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """What a script is given."""

    question: Question
    row: dict[str, Any]
    """The row of the file, with all of its columns."""
    rng: random.Random
    """Of this rollout alone; a script that draws from it writes the same in every run."""
    siblings: tuple[SiblingRecord, ...] = ()
    """What other rollouts of the question searched, and how they ended, where the prompt tells of them."""


Script = Callable[[Task], Generator[Search | Answer, list[Passage], Answer | None]]


@dataclass(slots=True)
class ScriptDriver:
    """Runs a script for many questions and makes demonstrations of what it does.

    Raises:
        ConfigError: an option that cannot work.
    """

    script: Script
    retriever: Retriever
    top_k: int = 3
    """Passages per search."""
    label: LabelRule = field(default_factory=F1LabelRule)
    """Tells of siblings whether they are CORRECT; it sees rollouts that have texts and no tokens."""
    block_share: float = 0.0
    """Share of questions whose prompt tells of siblings: other rollouts of the same script."""
    num_siblings: tuple[int, int] = (2, 4)
    """Least and most siblings of such a question."""
    max_searches: int = 8
    """Searches of one rollout; a script that asks for one more is taken to have no end."""
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.num_siblings
        for name, number, least in (("top_k", self.top_k, 1), ("max_searches", self.max_searches, 0)):
            if number < least:
                raise ConfigError(f"{name}: expected at least {least}, found {number}.")
        if not 0 <= self.block_share <= 1:
            raise ConfigError(f"block_share: expected a share between 0 and 1, found {self.block_share}.")
        if not 1 <= low <= high:
            raise ConfigError(f"num_siblings: expected two numbers, 1 or more, in order, found {low} {high}.")
        self.retriever, self.label = Retriever.adopt(self.retriever), LabelRule.adopt(self.label)

    def run(self, rows: Iterable[tuple[Row, Question]]) -> Iterator[Demonstration]:
        """A demonstration of each row, in their order.

        Raises:
            ConfigError: the script raises, does something else than search and answer, or does not end; the row is
                named.
            RetrievalError: a search failed.
        """
        numbered = enumerate(rows)
        while window := list(islice(numbered, WINDOW)):
            yield from self._window(window)

    def _window(self, window: Sequence[tuple[int, tuple[Row, Question]]]) -> list[Demonstration]:
        others = [
            _Rollout(self, index, row, question, sibling)
            for index, (row, question) in window
            for sibling in range(self._num_siblings(index))
        ]
        self._play(others)
        records: dict[int, list[SiblingRecord]] = {}
        for other in others:
            label = self.label.label(other.trajectory())
            records.setdefault(other.index, []).append(SiblingRecord(other.sibling, tuple(other.queries), label))
        shown = [
            _Rollout(self, index, row, question, None, tuple(records.get(index, ())))
            for index, (row, question) in window
        ]
        self._play(shown)
        return [Demonstration(one.task.question, tuple(one.turns), one.task.siblings) for one in shown]

    def _num_siblings(self, index: int) -> int:
        rng = self.rng(index, "block")
        return rng.randint(*self.num_siblings) if rng.random() < self.block_share else 0

    def rng(self, index: int, name: object) -> random.Random:
        """Numbers that depend on the seed, a row and a name in it, and on nothing else."""
        return random.Random(f"{self.seed}/script/{index}/{name}")

    def _play(self, rollouts: Sequence[_Rollout]) -> None:
        """Run all to their answers, a search of each at a time."""
        waiting = [(rollout, query) for rollout in rollouts if (query := rollout.advance(None)) is not None]
        while waiting:
            found = search_all(self.retriever, (query for _, query in waiting), self.top_k)
            asked = [(rollout, rollout.advance(found[query])) for rollout, query in waiting]
            waiting = [(rollout, query) for rollout, query in asked if query is not None]


class _Rollout:
    """One run of the script, from the question to the answer."""

    def __init__(
        self,
        driver: ScriptDriver,
        index: int,
        row: Row,
        question: Question,
        sibling: int | None,
        siblings: tuple[SiblingRecord, ...] = (),
    ) -> None:
        self._driver, self.index, self._where, self.sibling = driver, index, row.where, sibling or 0
        name = "shown" if sibling is None else sibling
        self.task = Task(question, row.values, driver.rng(index, name), siblings)
        self.turns: list[Turn] = []
        self.queries: list[str] = []
        self.thoughts: list[str] = []
        self._moves: Generator[Search | Answer, list[Passage], Answer | None] | None = None

    def advance(self, found: tuple[Passage, ...] | None) -> str | None:
        """Give the script what its search found, None at the start; what it searches next, None where it answered."""
        if found is not None:
            self.turns.append((SpanKind.OBSERVATION, found))
        move = self._next(found)
        if not isinstance(move, Search | Answer):
            told = "ended without an answer" if move is None else f"yielded {move!r:.60}"
            raise self._fault(f"expected it to yield Search(...) or Answer(...), but it {told}")
        texts = (SpanKind.REFINE, move.refine), (SpanKind.REASONING, move.thought)
        self.turns += [(kind, text) for kind, text in texts if text.strip()]
        if isinstance(move, Answer):
            self.turns.append((SpanKind.ANSWER, move.text))
            return None
        query = move.query.strip()
        if len(self.queries) >= self._driver.max_searches:
            raise self._fault(
                f"expected an answer after at most {self._driver.max_searches} searches (--max_searches), but it "
                f"searches {query!r:.60} too"
            )
        self.turns.append((SpanKind.QUERY, query))
        self.queries.append(query)
        self.thoughts.append(" ".join(f"{move.refine} {move.thought}".split()))
        return query

    def _next(self, found: tuple[Passage, ...] | None) -> object:
        try:
            if self._moves is not None:
                move: object = self._moves.send(list(found or ()))
            else:
                started: object = self._driver.script(self.task)
                if not isinstance(started, Generator):
                    return started
                self._moves = started
                move = next(started)
            if isinstance(move, Answer):
                self._moves.close()
            return move
        except StopIteration as end:
            return end.value
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = frames[min(1, len(frames) - 1)]
            told = f"{type(error).__name__}: {first_line(error)}"
            raise self._fault(f"{Path(place.filename).name} line {place.lineno} raised {told}") from error

    def _fault(self, told: str) -> ConfigError:
        return ConfigError(f"the script, {self._where} (question {self.task.question.id!r}): {told}.")

    def trajectory(self) -> Trajectory:
        """The rollout as rules of scoring read one: texts and passages, and no tokens."""
        texts = {kind: [text for found, text in self.turns if found is kind] for kind in SpanKind}
        return Trajectory(
            self.task.question,
            (0, self.index),
            self.sibling,
            (Span(SpanKind.PROMPT, ()),),
            StopReason.ANSWERED,
            queries=tuple(self.queries),
            passages=tuple(texts[SpanKind.OBSERVATION]),  # type: ignore[arg-type]
            thoughts=tuple(self.thoughts),
            answer=str(texts[SpanKind.ANSWER][0]).strip(),
            refinements=tuple(map(str, texts[SpanKind.REFINE])),
        )


@dataclass(slots=True)
class Tally:
    """Counts of what a script wrote."""

    demonstrations: int = 0
    searches: int = 0
    right: int = 0
    """Demonstrations whose answer matches a gold answer exactly."""
    siblings: int = 0
    correct_siblings: int = 0

    def counting(self, demonstrations: Iterable[Demonstration]) -> Iterator[Demonstration]:
        """The same demonstrations, counted on their way."""
        for one in demonstrations:
            asked = one.question
            self.demonstrations += 1
            self.searches += sum(kind is SpanKind.QUERY for kind, _ in one.turns)
            self.right += exact_match(str(one.turns[-1][1]), asked.answers, asked.normalization) > 0
            self.siblings += len(one.siblings)
            self.correct_siblings += sum(sibling.label is Label.CORRECT for sibling in one.siblings)
            yield one
