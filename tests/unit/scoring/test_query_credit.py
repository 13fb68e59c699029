"""Credit per search: each rule by hand, what is standardised, and what is refused."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.training_rollouts import DIRECT, ONE, TWO, group, rollout
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.policy_credit import InformationGain, SelfJudgement, searches_of
from sdsearch_lightning.scoring.query_credit import (
    AnchorAdvantage,
    AnswerEvidence,
    Continuation,
    CreditScale,
    EvidenceReward,
    LexicalEvidence,
    PolicyReader,
    QueryCredit,
    SupportEvidence,
    assigned,
    standardised,
)
from sdsearch_lightning.types import Passage, RolloutGroup, SpanKind, Trajectory


def alone(values: torch.Tensor) -> torch.Tensor:
    return values


def reading(*found: Sequence[str]) -> tuple[tuple[Passage, ...], ...]:
    """Passages by search, of these texts."""
    return tuple(tuple(Passage(text, text) for text in texts) for texts in found)


# The rules by hand


def test_lexical_evidence_looks_for_the_thought_in_one_passage() -> None:
    played = rollout(f"<think> the river </think> {TWO}")
    assert played.thoughts == ("the river", "Oslo"), "what stands before each query in its turn, without tags"
    two = replace(played, thoughts=("need river of Rome", "Oslo"))
    found = {
        ("Rome river_b is Tiber .", "Oslo"): [1.0, 1.0],
        ("Rome is old . ", "Oslo river_a"): [0.0, 1.0],
        ("Norway river_b is Tiber .", "Norway"): [0.0, 0.0],
        ("Rome river_b is Tiber .", "Oslos"): [1.0, 0.0],
    }
    for (first, second), expected in found.items():
        rollouts = replace(two, passages=reading((first,), (second, "and more")))
        assert LexicalEvidence().assign(group(rollouts)) == [expected]
    silent = replace(two, thoughts=("need of", ""), passages=reading(("need of",), ("",)))
    assert LexicalEvidence().assign(group(silent)) == [[0.0, 0.0]], "a thought that says nothing finds nothing"


def test_answer_evidence_looks_for_the_gold_answer() -> None:
    one = rollout(ONE)
    assert one.question.answers == ("Rome",)
    for text, value in (("the Rome .", 1.0), ("Romeo", 0.0), ("ROME", 1.0)):
        assert AnswerEvidence().assign(group(replace(one, passages=reading((text,))))) == [[value]]


def titled(*titles: str) -> tuple[Passage, ...]:
    """Passages as corpora have them, with ids that say nothing."""
    return tuple(Passage(f"id of {title}", f'"{title}"\ntext of {title}') for title in titles)


def with_support(*support: str, rule: str = "english") -> Trajectory:
    """A rollout of two searches, of a question with this support."""
    two = rollout(TWO)
    return replace(two, question=replace(two.question, support=support, normalization=rule))


def supported(rollout: Trajectory, *found: tuple[Passage, ...]) -> list[list[float]]:
    values = SupportEvidence().assign(group(replace(rollout, passages=found)))
    assert assigned(SupportEvidence(), group(replace(rollout, passages=found))) == [tuple(row) for row in values]
    return values


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (titled("Oslo", "Rome"), titled("Tiber (river)"), [1.0, 1.0]),
        (titled("rome"), titled("THE Tiber River"), [1.0, 1.0]),
        (titled("Rome"), titled("Rome"), [1.0, 0.0]),  # a query repeated is not paid again
        (titled("Rome", "Tiber river"), titled("Tiber river"), [1.0, 0.0]),  # nor what came with another
        (titled("Rome"), (*titled("Rome"), *titled("Tiber river")), [1.0, 1.0]),
        (titled("Romeo"), titled("Ancient Rome"), [0.0, 0.0]),  # a title counts whole
        ((Passage("Rome", "no title"),), (Passage("d7", "Tiber (River)\nno quotes"),), [1.0, 1.0]),  # an id; no quotes
        ((Passage("rome", "no title"),), (), [0.0, 0.0]),  # an id counts to the letter
        ((Passage("1", '""\nuntitled'),), (Passage("2", ""),), [0.0, 0.0]),
    ],
)
def test_support_evidence_pays_each_supporting_passage_once(
    first: tuple[Passage, ...], second: tuple[Passage, ...], expected: list[float]
) -> None:
    assert supported(with_support("Rome", "Tiber (river)"), first, second) == [expected]
    assert supported(with_support(), first, second) == [[0.0, 0.0]], "no support, no credit"


def test_support_is_per_rollout_and_by_the_rule_of_the_question() -> None:
    one = replace(with_support("Rome"), passages=(titled("Rome"), titled("Oslo")))
    other = replace(one, rollout_index=1, passages=(titled("Oslo"), titled("Rome")))
    assert SupportEvidence().assign(group(one, other)) == [[1.0, 0.0], [0.0, 1.0]]
    for rule, value in (("english", 0.0), ("unicode", 1.0)):
        assert supported(with_support("STRASSE", rule=rule), titled("Straße"), ()) == [[value, 0.0]]
    assert supported(with_support("The The", "!!!"), titled("A"), titled("the the")) == [[0.0, 1.0]], "all but vanish"
    assert supported(with_support(""), (Passage("1", '""\nuntitled'),), ()) == [[0.0, 0.0]], (
        "no title is no title's equal"
    )


def test_support_that_nobody_has_is_told_at_start() -> None:
    bare, asked = rollout(ONE).question, with_support("Rome").question
    SupportEvidence().check_questions([bare, asked])
    with pytest.raises(
        ConfigError, match=r"that name supporting passages, found none among 2\. Name the place in data"
    ):
        SupportEvidence().check_questions([bare, bare])
    AnswerEvidence().check_questions([bare])


def test_anchors_compare_searches_from_one_state() -> None:
    """Two rollouts read the same first and go on; a third read something else."""
    first, second, third = (rollout(TWO, i) for i in range(3))
    a, b, c = ("a",), ("b",), ("c",)
    rollouts = (
        replace(first, reward=1.0, passages=reading(a, c)),
        replace(second, reward=0.0, passages=reading(a, b)),
        replace(third, reward=0.5, passages=reading(b, b)),
    )
    assert AnchorAdvantage().assign(group(*rollouts)) == [[0.5, 0.5], [-0.5, -0.5], [0.0, 0.0]]


def test_evidence_as_a_reward() -> None:
    one = replace(rollout(TWO), answer="Rome", thoughts=("need river of Rome", "Oslo"))
    half = replace(one, passages=reading(("Rome river_a",), ("nothing",)))
    assert EvidenceReward(0.4).score(half) == pytest.approx(1 + 0.4 / 2)
    assert EvidenceReward(0.4).score(rollout(DIRECT)) == 0.0


# Standardised


@pytest.mark.parametrize(("scale", "together"), [("step", True), ("group", False)])
def test_credit_is_standardised_by_hand(scale: CreditScale, together: bool) -> None:
    values = [[1.0, 0.0, 0.0], [0.5, 3.0]]
    found = standardised(values, scale, alone)
    for row, ours in zip(values, found, strict=True):
        others = [v for r in values for v in r] if together else row
        mean, std = math.fsum(others) / len(others), statistics.stdev(others)
        expected = [(v - mean) / (std + 1e-6) for v in row]
        assert ours == pytest.approx(expected, abs=1e-12)
        assert ours != pytest.approx([x * (1 + 1e-6) for x in expected], abs=1e-12)
    assert standardised(values, "none", alone) == values


@pytest.mark.parametrize("scale", ["step", "group"])
@pytest.mark.parametrize("values", [[[0.1] * 3, [0.1] * 4], [[0.7]], [[]], []])
def test_without_contrast_there_is_no_credit(scale: CreditScale, values: list[list[float]]) -> None:
    assert standardised(values, scale, alone) == [[0.0] * len(row) for row in values]


def test_two_processes_standardise_as_one() -> None:
    values = [[1.0, 0.0, 0.25], [0.5], [3.0, -1.0]]
    whole = standardised(values, "step", alone)

    def sums(mine: torch.Tensor) -> torch.Tensor:
        """Of both ranks, in the order in which they are asked for."""
        if len(mine) == 2:
            return torch.tensor([3.75, 6.0], dtype=torch.float64)
        mean = 3.75 / 6
        return torch.tensor([math.fsum((v - mean) ** 2 for row in values for v in row)], dtype=torch.float64)

    halves = [*standardised(values[:1], "step", sums), *standardised(values[1:], "step", sums)]
    for ours, theirs in zip(halves, whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-14)


# Asking the policy


class Script(PolicyReader):
    """Answers by a rule; remembers what it was asked."""

    def __init__(self, rule: Any) -> None:
        self.rule, self.asked = rule, []

    def logprobs(self, asked: Sequence[Continuation]) -> list[float]:
        self.asked += asked
        return [self.rule(text) for text in asked]


def groups_that_read() -> list[RolloutGroup]:
    return [group(rollout(TWO, 0), rollout(DIRECT, 1)), group(rollout(ONE, 0, position=1), rollout(ONE, 1, position=1))]


def test_searches_of_a_rollout_are_what_was_read() -> None:
    two = rollout(TWO)
    first, second = searches_of(two)
    assert first and second
    shown = [span for span in two.spans if span.kind is SpanKind.OBSERVATION]
    assert [first.observation, second.observation] == [span.token_ids for span in shown]
    assert (
        two.token_ids[: len(first.before)] == first.before
        and first.before + first.observation == second.before[: len(first.before) + len(first.observation)]
    )
    last = max(i for i, span in enumerate(two.spans) if span.kind is SpanKind.OBSERVATION)
    cut = replace(two, spans=two.spans[:last])
    assert list(searches_of(cut)) == [first, None], "a search whose passages were never shown"


def test_information_gain_is_real_less_random() -> None:
    groups, credit = groups_that_read(), InformationGain(num_random=2)
    reader = Script(lambda text: -0.25 * len(text.shared) - 0.01 * sum(text.own))
    credit.read(groups, reader)
    assert {text.text for text in reader.asked} == {" Rome "} and {text.prefix for text in reader.asked} == {"<answer>"}
    assert len(reader.asked) == 4 * 3, "four searches, each after its own passages and after two others"
    for start in range(0, 12, 3):
        assert len({text.shared for text in reader.asked[start : start + 3]}) == 1
    found = [credit.assign(g) for g in groups]
    assert [[len(row) for row in rows] for rows in found] == [[2, 0], [1, 1]]
    asked = iter(reader.asked)
    for value in (v for rows in found for row in rows for v in row):
        real, one, other = (reader.rule(next(asked)) for _ in range(3))
        assert value == pytest.approx(real - (one + other) / 2, abs=1e-12)
    lonely = InformationGain()
    lonely.read(groups[:1], Script(lambda text: 1.0))
    assert lonely.assign(groups[0]) == [[0.0, 0.0], []], "no other question's passages"


def test_random_passages_are_those_of_other_questions() -> None:
    groups = groups_that_read()
    credit, reader = InformationGain(num_random=9), Script(lambda text: 0.0)
    credit.read(groups, reader)
    of_first = [s.observation for t in groups[0].trajectories for s in searches_of(t) if s]
    of_second = [s.observation for t in groups[1].trajectories for s in searches_of(t) if s]
    assert sorted(t.own for t in reader.asked[1:3]) == sorted(of_second)
    assert [t.own for t in reader.asked[-2:]] != [t.own for t in reader.asked[-3:-1]] or of_first[0] == of_first[1]


def test_self_judgement_compares_two_verdicts() -> None:
    groups, credit = groups_that_read(), SelfJudgement()
    said = {" need": math.log(0.2), " found": math.log(0.1)}
    reader = Script(lambda text: said.get(text.text, -0.01 * len(text.shared)))
    credit.read(groups, reader)
    assert [text.text for text in reader.asked] == [" need", " found", " missing"] * 4
    expected = [math.log(0.3) + 0.01 * len(t.shared) for t in reader.asked[:6:3]]
    assert credit.assign(groups[0])[0] == pytest.approx(expected, abs=1e-12)
    assert credit.assign(groups[0])[0] != pytest.approx([x + 1e-9 for x in expected], abs=1e-12)


# A user's own, and what is refused


def test_a_credit_of_ones_own() -> None:
    class Mine:
        def assign(self, group):  # type: ignore[no-untyped-def]
            return [[len(query.split()) for query in rollout.queries] for rollout in group.trajectories]

    mine = QueryCredit.adopt(Mine())
    assert isinstance(mine, QueryCredit)
    mine.read([], None)  # type: ignore[attr-defined]
    mine.check_questions([])  # type: ignore[attr-defined]
    assert assigned(mine, group(rollout(TWO), rollout(DIRECT, 1))) == [(2.0, 1.0), ()]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[1.0]], r"expected one number per executed query, \[2, 0\] for the rollouts of question 'q0', found \[1\]"),
        ([[1.0], []], r"found \[1, 0\]"),
        ([1.0, 2.0], "expected a list of numbers per rollout, found"),
        (None, "expected a list of numbers per rollout, found None"),
        ([[1.0, math.nan], []], "expected finite numbers"),
    ],
)
def test_what_is_no_credit_is_refused(values: Any, message: str) -> None:
    class Wrong(QueryCredit):
        def assign(self, group: RolloutGroup) -> Any:
            return values

    with pytest.raises(ConfigError, match=message):
        assigned(Wrong(), group(rollout(TWO), rollout(DIRECT, 1)))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected at least 1, found 0"):
        InformationGain(0)
    for found, missing in (((" a", " b"), (" b",)), ((), (" b",))):
        with pytest.raises(ConfigError, match="expected different texts for `found` and `missing`"):
            SelfJudgement(found, missing)
