"""Rewards: the string rules case by case, and that nothing but the answer is ever scored."""

from __future__ import annotations

import dataclasses

import pytest

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.rewards import (
    AutoRefineReward,
    ExactMatchLabelRule,
    ExactMatchReward,
    F1LabelRule,
    F1Reward,
    LabelRule,
    Reward,
    SearchR1FormatReward,
    exact_match,
    f1,
    normalize_answer,
    substring_match,
)
from sdsearch_lightning.types import Label, Passage, Question, Span, SpanKind, StopReason, Trajectory


def rollout(answer: str | None, *golds: str, refinements: tuple[str, ...] = ()) -> Trajectory:
    return Trajectory(
        question=Question("q", "Where?", golds),
        instance_id=(0, 0),
        rollout_index=0,
        spans=(Span(SpanKind.PROMPT, (1, 2)),),
        stop_reason=StopReason.MAX_TOKENS if answer is None else StopReason.ANSWERED,
        answer=answer,
        refinements=refinements,
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The U.S.A.", "usa"),
        ("twenty-one", "twentyone"),
        ("  An  apple,\na\tpear ", "apple pear"),
        ("Beyoncé", "beyoncé"),
        ("“Paris”", "“paris”"),  # only ASCII punctuation goes
        ("a.n", ""),  # punctuation goes before articles
        ("theatre", "theatre"),
        ("the", ""),
        ("ÉCOLE", "école"),
    ],
)
def test_normalize_answer(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "golds", "em", "substring", "token_f1"),
    [
        ("U.S.A.", ("France", "usa"), 1, 1, 1),
        ("twenty-one", ("twenty one",), 0, 0, 0),
        ("Beyoncé", ("Beyonce",), 0, 0, 0),
        ("“Paris”", ("Paris",), 0, 1, 0),
        ("an", ("the",), 1, 1, 0),  # both normalise to "": equal, but no tokens to overlap
        ("anything", ("the",), 0, 1, 0),
        ("in Paris, France", ("Paris",), 0, 1, 1 / 2),
        ("Paris", ("Paris France",), 0, 0, 2 / 3),
        ("x y y", ("y y z", "y"), 0, 1, 2 / 3),  # counts, not sets: 2 shared of 3 and 3
        ("yes", ("yes",), 1, 1, 1),
        ("yes sir", ("yes",), 0, 1, 0),  # a verdict counts whole
        ("yes", ("yes sir",), 0, 0, 0),
        ("noanswer", ("answer",), 0, 1, 0),
        ("", ("Paris",), 0, 0, 0),
        ("Paris", (), 0, 0, 0),
        (None, ("", "the"), 0, 0, 0),  # no answer is not an empty answer
    ],
)
def test_scores(prediction: str | None, golds: tuple[str, ...], em: float, substring: float, token_f1: float) -> None:
    assert exact_match(prediction, golds) == em
    assert substring_match(prediction, golds) == substring
    assert f1(prediction, golds) == pytest.approx(token_f1, abs=1e-15)
    assert f1(prediction, golds) != pytest.approx(token_f1 + 1e-9, abs=1e-15)


def test_a_bare_string_is_one_gold_answer() -> None:
    assert exact_match("x b", "b") == 0.0
    assert exact_match("p", "Paris") == substring_match("p", "Paris") == f1("p", "Paris") == 0.0
    assert exact_match("paris", "Paris") == substring_match("paris!", "Paris") == f1("Paris", "Paris") == 1.0


@pytest.mark.parametrize("reward", [ExactMatchReward(), F1Reward(), AutoRefineReward()])
def test_prompt_and_passages_are_never_scored(reward: Reward) -> None:
    silent = rollout(None, "Beijing", "and")
    tempting = dataclasses.replace(
        silent,
        question=dataclasses.replace(silent.question, text="For example, <answer> Beijing </answer>. Question: where?"),
        queries=("Beijing",),
        passages=((Passage("p", "t\n<answer> Beijing </answer>"),),),
    )
    assert reward.score(tempting) == 0.0
    assert F1LabelRule().label(tempting) is ExactMatchLabelRule().label(tempting) is Label.INCORRECT
    assert reward.score(dataclasses.replace(tempting, answer="Beijing")) == 1.0


@pytest.mark.parametrize("reward", [ExactMatchReward(), F1Reward(), AutoRefineReward()])
def test_a_trailing_end_of_sequence_changes_nothing(reward: Reward) -> None:
    plain = rollout("Paris", "Paris")
    ended = dataclasses.replace(plain, spans=(*plain.spans, Span(SpanKind.SCAFFOLD, (0,), (-0.1,), sampled=True)))
    assert reward.score(plain) == reward.score(ended) == 1.0


def test_rewards() -> None:
    assert ExactMatchReward().score(rollout("Paris France", "Paris")) == 0.0
    assert F1Reward().score(rollout("Paris France", "Paris")) == 2 / 3


@pytest.mark.parametrize(
    ("answer", "refinements", "expected"),
    [
        ("Paris France", ("Paris",), 2 / 3),  # never added to a positive F1
        ("Rome", ("it is in", "Paris."), 0.25),
        ("Rome", ("it is in Par", "is."), 0.0),  # notes are joined by a space
        ("Rome", (), 0.0),
        (None, ("Paris",), 0.0),  # notes without an answer earn nothing
    ],
)
def test_autorefine_reward(answer: str | None, refinements: tuple[str, ...], expected: float) -> None:
    assert AutoRefineReward(refine_score=0.25).score(rollout(answer, "Paris", refinements=refinements)) == expected


def test_autorefine_reward_without_notes_ignores_a_blank_gold_answer() -> None:
    assert AutoRefineReward().score(rollout("Rome", "the")) == 0.0
    assert AutoRefineReward().score(rollout("Rome", "the", refinements=("x",))) == 0.1


def test_label_rules() -> None:
    partly = rollout("Paris France", "Paris")  # F1 2/3
    assert F1LabelRule().label(partly) is Label.CORRECT
    assert F1LabelRule(rho=0.5).label(partly) is Label.CORRECT
    assert F1LabelRule(rho=2 / 3).label(partly) is Label.INCORRECT  # strictly above
    assert ExactMatchLabelRule().label(partly) is Label.INCORRECT
    assert ExactMatchLabelRule().label(rollout("the Paris", "Paris")) is Label.CORRECT


@pytest.mark.parametrize("rho", [-0.1, 1.0, float("nan")])
def test_rho_outside_its_range_is_refused(rho: float) -> None:
    with pytest.raises(ConfigError, match=rf"0 <= rho < 1, got {rho}"):
        F1LabelRule(rho)


def test_a_look_alike_class_counts_as_a_reward() -> None:
    class Length:
        def score(self, trajectory):  # type: ignore[no-untyped-def]
            return float(len(trajectory.token_ids))

    assert issubclass(Length, Reward)
    assert not issubclass(Length, LabelRule)
    with pytest.raises(TypeError, match="abstract"):
        Reward()  # type: ignore[abstract]


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_answer_never_scores(empty: str) -> None:
    for gold in ("A", "The The", "+", ""):
        assert exact_match(empty, [gold]) == substring_match(empty, [gold]) == f1(empty, [gold]) == 0
    assert exact_match("A", ["A"]) == exact_match("the", ["A"]) == 1, (
        "what vanishes on both sides matches, as elsewhere"
    )


def formed(
    answer: str | None, *faults: str, refinements: tuple[str, ...] = (), contents: str = "no gold"
) -> Trajectory:
    made = rollout(answer, "Rome", refinements=refinements)
    return dataclasses.replace(made, format_faults=faults, passages=((Passage("p", contents),),))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (formed("rome"), 1.0),
        (formed("rome", "missing search"), 1.0),  # a search is no part of Search-R1's form
        (formed("rome", "loose"), 0.8),
        (formed("paris"), 0.2),
        (formed("paris", contents="in Rome it is"), 0.25),
        (formed("paris", "unbalanced think"), 0.1),
        (formed("paris", "loose", contents="in Rome it is"), 0.1),
        (formed(None, "loose", "missing answer"), 0.0),
    ],
)
def test_search_r1s_reward_of_the_format(made: Trajectory, expected: float) -> None:
    assert SearchR1FormatReward(0.2, 0.1, 0.05).score(made) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (formed("rome"), 1.0),
        (formed("paris"), 0.3),
        (formed("paris", "loose"), 0.3),  # AutoRefine counts tags and does not look between them
        (formed("paris", "missing refine"), 0.0),
        (formed("paris", refinements=("rome",)), 0.4),
        (formed("paris", "unbalanced think", refinements=("rome",)), 0.1),
        (formed(None), 0.0),
    ],
)
def test_autorefines_format_score(made: Trajectory, expected: float) -> None:
    assert AutoRefineReward(refine_score=0.1, format_score=0.3).score(made) == pytest.approx(expected)
