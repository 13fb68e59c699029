"""What users' rewards and label rules give is looked at: before the first rollouts, and at each of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from helpers.training_rollouts import DIRECT, ONE, TWO, rollout
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.advantages import group_relative
from sdsearch_lightning.scoring.rewards import ExactMatchReward, F1LabelRule, Reward
from sdsearch_lightning.scoring.scoring import Scoring
from sdsearch_lightning.types import Label, Question, StopReason, Trajectory

BY_F1 = F1LabelRule()
QUESTION = Question("q7", "where is Rome", ("Rome",))


class Given(Reward):
    """Gives what it is told to give, in turn."""

    def __init__(self, *values: Any) -> None:
        self.values = list(values)

    def score(self, trajectory: Trajectory) -> Any:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def scoring(*rewards: Any, label: Any = BY_F1) -> Scoring:
    return Scoring(Given(*rewards), label)


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5", [1.0, 2.0], object()])
def test_a_reward_that_is_no_number_is_refused_at_the_start(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"rollout.reward Given.score: expected a finite number, .* of question 'q7'"):
        scoring(value).probe(QUESTION)


@pytest.mark.parametrize("value", [True, 1, np.float32(0.5), torch.tensor(0.25), None])
def test_whatever_is_a_number_will_do(value: Any) -> None:
    group = scoring(value).probe(QUESTION)
    assert {t.reward for t in group.trajectories} == {None if value is None else float(value)}


def test_a_reward_that_fails_without_an_answer_is_told_before_the_first_rollout() -> None:
    class Hasty(Reward):
        def score(self, trajectory: Trajectory) -> float:
            return float(len(trajectory.answer))  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"Hasty fails on a rollout of question 'q7' without an answer: TypeError: "):
        Scoring(Hasty(), F1LabelRule()).probe(QUESTION)


def test_a_label_that_is_none_is_refused() -> None:
    class Yes:
        def label(self, trajectory: Trajectory) -> bool:
            return True

    with pytest.raises(ConfigError, match=r"rollout.label Yes.label: expected Label.CORRECT or .* found True"):
        scoring(0.5, label=Yes()).probe(QUESTION)


def test_no_verdict_has_no_part_in_the_baseline() -> None:
    rollouts = [rollout(TWO, 0), rollout(ONE, 1), rollout(DIRECT, 2), rollout(DIRECT, 3)]
    group = scoring(1.0, None, 0.0, 0.5).group(rollouts)
    expected = group_relative(torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64))[0].tolist()
    assert [t.advantage for t in group.trajectories] == [expected[0], 0.0, *expected[1:]]
    assert [t.reward for t in group.trajectories] == [1.0, None, 0.0, 0.5]
    assert group.trajectories[1].label is Label.CORRECT, "the label rule has its own verdict"
    assert group.has_signal and not scoring(1.0, None, 1.0, 1.0).group(rollouts).has_signal
    silent = scoring(None).group(rollouts)
    assert [t.advantage for t in silent.trajectories] == [0.0] * 4 and not silent.has_signal


def test_a_failed_search_has_no_label_and_no_part() -> None:
    failed = replace(rollout(ONE, 1), stop_reason=StopReason.RETRIEVAL_ERROR)
    group = Scoring(ExactMatchReward(), F1LabelRule()).group([rollout(TWO, 0), failed, rollout(DIRECT, 2)])
    assert group.trajectories[1].label is None and group.trajectories[1].advantage == 0.0
