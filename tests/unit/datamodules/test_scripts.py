"""The driver of scripts: who is asked what together, what depends on what, and every way a script can go wrong."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers.passages import PASSAGES, ToyRetriever
from helpers.paths import ROOT
from sdsearch_lightning.datamodules import scripts
from sdsearch_lightning.datamodules.demonstrations import read_demonstrations, write_demonstrations
from sdsearch_lightning.datamodules.readers import question_rows
from sdsearch_lightning.datamodules.scripts import Answer, ScriptDriver, Search, Tally, Task
from sdsearch_lightning.errors import ConfigError, RetrievalError
from sdsearch_lightning.retrieval.jsonl import Row
from sdsearch_lightning.scoring.rewards import ExactMatchLabelRule
from sdsearch_lightning.types import Demonstration, Label, Question, SiblingRecord, SpanKind, Trajectory

CITIES = ("Paris", "Rome", "France", "Italy", "Seine", "Tiber")


def rows(count: int = 4) -> Iterator[tuple[Row, Question]]:
    """Questions about cities, each with a column of the user's own."""
    for i in range(count):
        values = {"question": f"where is {CITIES[i % 6]} ?", "metadata": {"city": CITIES[i % 6], "searches": 1 + i % 3}}
        yield Row(values, f"q.jsonl line {i + 1}", i), Question(f"q{i}", values["question"], (CITIES[i % 6],), "q")


def wandering(task: Task) -> Iterator[Search | Answer]:
    """As many searches as the row says, of a city and a random word; right about as often as not."""
    city, answer = task.row["metadata"]["city"], "nowhere"
    for _ in range(task.row["metadata"]["searches"]):
        found = yield Search(
            f"{city} {task.rng.choice(['river', 'capital', 'France', 'Italy'])}", thought=f"what of {city}"
        )
        answer = task.rng.choice([city, found[0].id])
    yield Answer(answer, thought="found" if not task.siblings else "found, as others did")


def drive(script: Callable[[Task], Any], count: int = 4, **options: Any) -> list[Demonstration]:
    return list(ScriptDriver(script, options.pop("retriever", ToyRetriever()), **options).run(rows(count)))


def test_a_rollout_is_written_turn_by_turn() -> None:
    def script(task: Task) -> Iterator[Search | Answer]:
        first = yield Search(" Paris river ", thought="which river")
        assert [passage.id for passage in first] == ["4", "0"] and isinstance(first, list)
        yield Search("Rome", refine=first[0].text)
        yield Answer("Seine", "so it is", "Rome is elsewhere")

    (one,) = drive(script, 1, top_k=2)
    first, second = ToyRetriever().search(["Paris river", "Rome"], 2)
    assert one.turns == (
        (SpanKind.REASONING, "which river"),
        (SpanKind.QUERY, "Paris river"),
        (SpanKind.OBSERVATION, tuple(first)),
        (SpanKind.REFINE, "a river of Paris"),
        (SpanKind.QUERY, "Rome"),
        (SpanKind.OBSERVATION, tuple(second)),
        (SpanKind.REFINE, "Rome is elsewhere"),
        (SpanKind.REASONING, "so it is"),
        (SpanKind.ANSWER, "Seine"),
    )
    assert one.siblings == () and one.question.id == "q0"


def test_an_answer_may_be_returned() -> None:
    def returning(task: Task) -> Any:
        yield Search("Rome")
        return Answer("Rome")

    assert [one.turns[-1] for one in drive(returning, 2)] == [(SpanKind.ANSWER, "Rome")] * 2
    assert drive(lambda task: Answer(task.question.text), 1)[0].turns == ((SpanKind.ANSWER, "where is Paris ?"),)


def test_searches_of_all_questions_go_together() -> None:
    engine = ToyRetriever()
    shown = drive(wandering, 6, retriever=engine)
    asked = [[text for kind, text in one.turns if kind is SpanKind.QUERY] for one in shown]
    assert [len(queries) for queries in asked] == [1, 2, 3] * 2
    waves = [[queries[i] for queries in asked if len(queries) > i] for i in range(3)]
    assert engine.calls == [list(dict.fromkeys(wave)) for wave in waves]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_neither_limit_nor_batch_changes_a_row(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    options = {"block_share": 0.6, "seed": 5}
    whole = drive(wandering, 12, **options)
    assert len({str(one.turns) for one in whole}) == 12 and {bool(one.siblings) for one in whole} == {True, False}
    monkeypatch.setattr(scripts, "WINDOW", window)
    assert drive(wandering, 12, **options) == whole
    assert drive(wandering, 5, **options) == whole[:5]
    assert drive(wandering, 12, **options | {"seed": 6}) != whole


def test_siblings_are_other_rollouts_of_the_script() -> None:
    seen: list[tuple[SiblingRecord, ...]] = []

    def script(task: Task) -> Iterator[Search | Answer]:
        seen.append(task.siblings)
        yield from wandering(task)

    shown = drive(script, 12, block_share=0.5, num_siblings=(3, 4), label=ExactMatchLabelRule())
    blocked = [one for one in shown if one.siblings]
    assert 2 <= len(blocked) <= 10 and {len(one.siblings) for one in blocked} == {3, 4}
    assert [siblings for siblings in seen if siblings] == [one.siblings for one in blocked]
    assert len(seen) == len(shown) + sum(len(one.siblings) for one in shown), "a sibling is run and told of none"
    labels = [sibling.label for one in blocked for sibling in one.siblings]
    assert {Label.CORRECT, Label.INCORRECT} == set(labels)
    for one in blocked:
        assert [sibling.rollout_index for sibling in one.siblings] == [*range(len(one.siblings))]
        searched = {queries for sibling in one.siblings for queries in sibling.queries}
        assert all(query.split()[0] == one.question.answers[0] for query in searched)
        assert one.turns[-2] == (SpanKind.REASONING, "found, as others did")
    told = {sibling.queries for one in blocked for sibling in one.siblings}
    assert len(told) > len(blocked), "they draw other numbers"


def test_a_sibling_is_labelled_by_the_rule_and_its_rollout() -> None:
    judged: list[Trajectory] = []

    class Mine:
        def label(self, trajectory: Trajectory) -> Label:
            judged.append(trajectory)
            return Label.CORRECT if len(trajectory.queries) == 2 else Label.INCORRECT

    def script(task: Task) -> Iterator[Search | Answer]:
        yield Search("Rome", thought="a  b")
        if task.siblings or task.rng.random() < 0.5:
            yield Search("Tiber", refine="c", thought="d")
        yield Answer(" x ")

    for one in drive(script, 6, block_share=1.0, label=Mine(), top_k=1):  # type: ignore[arg-type]
        assert [sibling.label is Label.CORRECT for sibling in one.siblings] == [
            len(s.queries) == 2 for s in one.siblings
        ]
    longest = max(judged, key=lambda rollout: len(rollout.queries))
    assert (longest.queries, longest.thoughts, longest.refinements) == (("Rome", "Tiber"), ("a b", "c d"), ("c",))
    assert longest.answer == "x"
    assert longest.passages == tuple(tuple(found) for found in ToyRetriever().search(["Rome", "Tiber"], 1))


# What goes wrong


def raising(task: Task) -> Iterator[Search | Answer]:
    yield Search("x")
    raise KeyError(task.question.id)


def yielding(move: Any) -> Callable[[Task], Iterator[Any]]:
    def script(task: Task) -> Iterator[Any]:
        yield move() if callable(move) else move

    return script


def endless(task: Task) -> Iterator[Search | Answer]:
    while True:
        yield Search("x")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (raising, r"test_scripts.py line \d+ raised KeyError: 'q0'\."),
        (yielding("x"), r"expected it to yield Search\(\.\.\.\) or Answer\(\.\.\.\), but it yielded 'x'\."),
        (
            yielding(lambda: Search(" ")),
            r"raised ConfigError: Search: expected a query with some text in it, found none\.",
        ),
        (
            yielding(lambda: Search("<search>")),
            r"Search: expected a query without tags of the protocol, found <search>",
        ),
        (yielding(lambda: Search(None)), r"ConfigError: Search: expected text as query, found None\."),
        (yielding(lambda: Answer("a", 3)), r"ConfigError: Answer: expected text as thought, found 3\."),
        (yielding(lambda: Answer("\ud83d")), r"ConfigError: Answer: expected text as text, found '\\ud83d'\."),
        (yielding(Search("x")), "but it ended without an answer"),
        (lambda task: 3, "but it yielded 3"),
        (lambda: None, "raised TypeError: "),
        (endless, r"expected an answer after at most 8 searches \(--max_searches\), but it searches 'x' too\."),
    ],
)
def test_a_script_that_goes_wrong_is_told_with_its_row(script: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        drive(script)
    assert str(error.value).startswith("the script, q.jsonl line 1 (question 'q0'): ") and "\n" not in str(error.value)
    assert re.search(told, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"block_share": 1.5}, "block_share: expected a share between 0 and 1, found 1.5"),
        ({"num_siblings": (4, 2)}, "num_siblings: expected two numbers, 1 or more, in order, found 4 2"),
        ({"num_siblings": (0, 2)}, "found 0 2"),
        ({"top_k": 0}, "top_k: expected at least 1, found 0"),
        ({"max_searches": -1}, "max_searches: expected at least 0, found -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        drive(wandering, **options)


def test_a_search_that_fails_ends_it() -> None:
    def fail(queries: Sequence[str]) -> None:
        raise ConnectionError("no such host")

    with pytest.raises(RetrievalError, match="no such host"):
        drive(wandering, retriever=ToyRetriever(fail=fail))


# What comes of it


def test_a_tally_counts_what_passes() -> None:
    tally, shown = Tally(), drive(wandering, 9, block_share=0.5)
    assert list(tally.counting(shown)) == shown
    right = [one for one in shown if one.turns[-1][1] == one.question.answers[0]]
    siblings = [sibling for one in shown for sibling in one.siblings]
    assert (tally.demonstrations, tally.searches, tally.siblings) == (9, 18, len(siblings))
    assert 0 < tally.right == len(right) < 9
    assert 0 < tally.correct_siblings == sum(sibling.label is Label.CORRECT for sibling in siblings) < len(siblings)


def test_the_script_of_the_documentation_runs(tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n(# my_script.py\n.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    module: dict[str, Any] = {}
    exec(compile(text, "my_script.py", "exec"), module)
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "river ?", "answers": ["Seine"], "steps": [["France", "Italy"], ["Paris river"]]}\n')
    driver = ScriptDriver(module["script"], ToyRetriever(PASSAGES), block_share=1.0, num_siblings=(4, 4))
    write_demonstrations(tmp_path / "made.jsonl", driver.run(question_rows(path)))
    (one,) = read_demonstrations(tmp_path / "made.jsonl")
    queries = tuple(text for kind, text in one.turns if kind is SpanKind.QUERY)
    assert one.turns[-1] == (SpanKind.ANSWER, "Seine") and len(one.siblings) == 4
    assert queries in {sibling.queries for sibling in one.siblings if sibling.label is Label.CORRECT}
    assert random.Random("0/script/0/shown").random() == driver.rng(0, "shown").random()
