"""From finished rollouts to scored groups: reward, label, group-relative advantage; users' classes are checked.

A reward that is no number would end as a gradient that is not finite, or as a TypeError hours later. So each value is
looked at, and both classes are tried on two made-up rollouts before the first real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.scoring.advantages import AdvantageScale, group_relative
from sdsearch_lightning.scoring.rewards import LabelRule, Reward
from sdsearch_lightning.types import (
    Label,
    Passage,
    Question,
    RolloutGroup,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)


@dataclass(frozen=True, slots=True)
class Scoring:
    """How rollouts are scored: reward, label for the hindsight block, and what an advantage is divided by."""

    reward: Reward
    label: LabelRule
    advantage_scale: AdvantageScale = "std"

    def group(self, rollouts: Sequence[Trajectory]) -> RolloutGroup:
        """The rollouts of one question with rewards, labels and group-relative advantages.

        A rollout that ended in a retrieval error has no label; neither it nor one whose reward is None (no verdict) has
        a part in the baseline: its advantage is 0.

        Raises:
            ConfigError: a reward is no finite number, or a label is none.
        """
        rewards = [self._reward_of(rollout) for rollout in rollouts]
        judged = {
            i: reward
            for i, (reward, rollout) in enumerate(zip(rewards, rollouts, strict=True))
            if reward is not None and not rollout.stop_reason.is_error
        }
        values = torch.tensor([[*judged.values()]], dtype=torch.float64)
        advantages = dict(zip(judged, group_relative(values, self.advantage_scale)[0].tolist(), strict=True))
        scored = [
            replace(
                rollout,
                reward=rewards[i],
                advantage=advantages.get(i, 0.0),
                label=None if rollout.stop_reason.is_error else self._label_of(rollout),
            )
            for i, rollout in enumerate(rollouts)
        ]
        return RolloutGroup(rollouts[0].question, rollouts[0].instance_id, tuple(scored))

    def groups(
        self, trajectories: Sequence[Trajectory], size: int, need_answers: bool = True
    ) -> tuple[RolloutGroup, ...]:
        """Groups of `size` rollouts, in the order in which they were asked for.

        Args:
            trajectories: those of one question stand together.
            size: rollouts per question.
            need_answers: False leaves the rollouts of a question without gold answers unscored.
        """
        parts = [trajectories[at : at + size] for at in range(0, len(trajectories), size)]
        return tuple(
            self.group(part)
            if need_answers or part[0].question.answers
            else RolloutGroup(part[0].question, part[0].instance_id, tuple(part))
            for part in parts
        )

    def probe(self, question: Question) -> RolloutGroup:
        """Try reward and label on two made-up rollouts of a question, before time is spent on real ones.

        Raises:
            ConfigError: one of them fails, or gives what cannot be used.
        """
        rollouts = made_up_rollouts(question)
        _try("reward", self.reward, self._reward_of, rollouts)
        _try("label", self.label, self._label_of, rollouts)
        return self.group(rollouts)

    def _reward_of(self, rollout: Trajectory) -> float | None:
        value = self.reward.score(rollout)
        try:
            reward = None if value is None else float(value)
        except (TypeError, ValueError):
            reward = math.nan
        if isinstance(value, str) or (reward is not None and not math.isfinite(reward)):
            raise ConfigError(
                f"rollout.reward {type(self.reward).__name__}.score: expected a finite number, or None for no verdict, "
                f"found {value!r:.60} for a rollout of question {rollout.question.id!r}."
            )
        return reward

    def _label_of(self, rollout: Trajectory) -> Label:
        label = self.label.label(rollout)
        if not isinstance(label, Label):
            raise ConfigError(
                f"rollout.label {type(self.label).__name__}.label: expected Label.CORRECT or Label.INCORRECT, found "
                f"{label!r:.60} for a rollout of question {rollout.question.id!r}."
            )
        return label


def _try(key: str, given: object, judge: Callable[[Trajectory], Any], rollouts: Sequence[Trajectory]) -> None:
    for rollout in rollouts:
        try:
            judge(rollout)
        except SDSearchError:
            raise
        except Exception as error:
            raise ConfigError(
                f"rollout.{key} {type(given).__name__} fails on a rollout of question {rollout.question.id!r} "
                f"{'without' if rollout.answer is None else 'with'} an answer: {type(error).__name__}: {error}."
            ) from error


def made_up_rollouts(question: Question) -> tuple[Trajectory, Trajectory]:
    """One that searched and gives the first gold answer, and one that ended without an answer."""
    word = (0,)
    prompt = Span(SpanKind.PROMPT, word)
    query, found = Span(SpanKind.QUERY, word, (-1.0,), sampled=True), Span(SpanKind.OBSERVATION, word)
    answer = Span(SpanKind.ANSWER, word, (-1.0,), sampled=True)
    instance = (0, 0)
    right = Trajectory(
        question,
        instance,
        0,
        (prompt, query, found, answer),
        StopReason.ANSWERED,
        queries=(question.text,),
        passages=((Passage("made-up", question.text),),),
        thoughts=("",),
        answer=next(iter(question.answers), ""),
    )
    return right, Trajectory(question, instance, 1, (prompt,), StopReason.MAX_TOKENS)
