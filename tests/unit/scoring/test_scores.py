"""RolloutScores against a count by hand, and that batches, order and ranks cannot change a bit of it."""

from __future__ import annotations

import random

import pytest
import torch

from sdsearch_lightning.scoring.scores import RolloutScores
from sdsearch_lightning.types import Question, Span, SpanKind, StopReason, Trajectory


def rollout(
    answer: str | None,
    *golds: str,
    stop: StopReason = StopReason.ANSWERED,
    queries: tuple[str, ...] = (),
    invalid: int = 0,
) -> Trajectory:
    return Trajectory(
        Question("q", "?", golds), (0, 0), 0, (Span(SpanKind.PROMPT, (1,)),), stop, queries=queries, answer=answer,
        num_invalid_actions=invalid,
    )  # fmt: skip


ROLLOUTS = [
    rollout("Paris", "paris", queries=("a", "b")),
    rollout("in Paris", "Paris", queries=("a",), invalid=1),
    rollout("Rome", "Paris"),
    rollout(None, "Paris", stop=StopReason.MAX_TOKENS, queries=("a", "b", "c")),
    rollout(None, "Paris", stop=StopReason.RETRIEVAL_ERROR),
    rollout(None, "Paris", stop=StopReason.MALFORMED, invalid=3),
]
EXPECTED = {
    "exact_match": 1 / 6,
    "f1": (1 + 2 / 3) / 6,
    "substring_match": 2 / 6,
    "searches_per_question": 6 / 6,
    "valid_action_rate": (6 + 3) / (6 + 3 + 4),
    "answered_rate": 3 / 6,
    "truncated_rate": 2 / 6,
    "retrieval_error_rate": 1 / 6,
    "questions": 6,
}


def scores(*batches: list[Trajectory]) -> dict[str, float]:
    metric = RolloutScores()
    for batch in batches:
        metric.update(batch)
    values = metric.compute()
    assert all(value.dtype == torch.float64 and value.shape == () for value in values.values())
    return {name: value.item() for name, value in values.items()}


def test_scores_by_hand() -> None:
    actual = scores(ROLLOUTS)
    assert actual == pytest.approx(EXPECTED, abs=1e-12)
    for name in EXPECTED:
        assert actual != pytest.approx(EXPECTED | {name: EXPECTED[name] + 1e-9}, abs=1e-12)


def test_every_rollout_moves_the_scores() -> None:
    for index in range(len(ROLLOUTS)):
        assert scores(ROLLOUTS[:index] + ROLLOUTS[index + 1 :]) != pytest.approx(EXPECTED, abs=1e-12)


def test_batches_order_and_ranks_change_no_bit() -> None:
    answers = ("x", "x y", "x y z", "u x v w q r t")
    rollouts = [rollout(" ".join(answers[i % 4].split()[: 1 + i % 3]), answers[i % 3]) for i in range(200)]
    whole = scores(rollouts)
    random.Random(0).shuffle(rollouts)
    assert scores(*(rollouts[start : start + 7] for start in range(0, 200, 7)), []) == whole
    ranks = [RolloutScores(), RolloutScores(), RolloutScores()]  # what a sum over ranks does
    for rank, share in zip(ranks, (rollouts[:50], [], rollouts[50:]), strict=True):
        rank.update(share)
    joined = RolloutScores()
    joined.update([])
    joined.sums = sum(rank.sums for rank in ranks)
    assert {name: value.item() for name, value in joined.compute().items()} == whole


def test_nothing_scored_and_nothing_done_are_zero_not_nan() -> None:
    assert set(scores([]).values()) == {0.0}
    assert scores([rollout(None, "x", stop=StopReason.MAX_TOKENS)])["valid_action_rate"] == 0.0
    assert scores([rollout("", "x")])["answered_rate"] == 1.0  # an empty answer is an answer, and wrong


def test_reset_forgets() -> None:
    metric = RolloutScores()
    metric.update(ROLLOUTS)
    metric.reset()
    metric.update(ROLLOUTS[:1])
    assert metric.compute()["exact_match"] == 1.0
    assert metric.compute()["questions"] == 1.0
