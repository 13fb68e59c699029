"""Groups whose every word tells what it is and whose, for the tests of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from helpers.passages import PROTOCOL, QUESTION
from helpers.trajectories import make_trajectory
from sdsearch_lightning.hindsight import (
    BlockBuilder,
    ContrastedSiblings,
    CorrectOnly,
    CurrentDocuments,
    GoldAnswer,
    LeaveOneOut,
    NoLabels,
    OwnRollout,
    Placebo,
    QueriesAndLabels,
    ShuffledLabels,
    SuccessfulSibling,
    UnmaskedRollouts,
)
from sdsearch_lightning.losses.weights import GroupsRule
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import HindsightBlock, Label, Passage, Question, RolloutGroup, StopReason, Trajectory

RIGHT, WRONG = Label.CORRECT, Label.INCORRECT
BUILDERS: tuple[type[BlockBuilder], ...] = (
    QueriesAndLabels,
    NoLabels,
    ShuffledLabels,
    CorrectOnly,
    OwnRollout,
    LeaveOneOut,
    UnmaskedRollouts,
    CurrentDocuments,
    Placebo,
    SuccessfulSibling,
    GoldAnswer,
    ContrastedSiblings,
)


def searching(mark: str, *queries: str, label: Label | None, **assigned: Any) -> Trajectory:
    """A rollout all of whose words tell what they are and whose: `mark` is in every one."""
    steps = " ".join(f"Q:{query} O:document_{mark} F:refined_{mark}" for query in queries)
    passages = tuple((Passage(query, f"title\ndocument {mark} of {query}"),) for query in queries)
    script = f"R:thought_{mark} {steps} A:gold_{mark}"
    return make_trajectory(script, label=label, passages=passages, **assigned)


def siblings(*trajectories: Trajectory, position: int = 0, question: Question = QUESTION) -> RolloutGroup:
    """The rollouts as one group about `question`, counted from 0."""
    rollouts = (
        replace(t, rollout_index=i, instance_id=(0, position), question=question) for i, t in enumerate(trajectories)
    )
    return RolloutGroup(question, (0, position), tuple(rollouts))


MIXED_SIBLINGS = siblings(
    searching("k0", "alpha", "beta", label=RIGHT),
    searching("k1", label=WRONG),
    searching("k2", "broken", label=None, stop_reason=StopReason.RETRIEVAL_ERROR),
    searching("k3", "gamma", label=WRONG),
    searching("k4", "delta", label=RIGHT),
)
OTHER_SIBLINGS = siblings(
    searching("x0", "epsilon", label=WRONG),
    searching("x1", "zeta", label=WRONG),
    position=1,
    question=Question("q1", "where is Rome ?", ("Italy",)),
)


def build_blocks(
    codec: TokenCodec, builder: BlockBuilder, *groups: RolloutGroup, rule: GroupsRule = "all"
) -> list[HindsightBlock | None]:
    return builder.build(groups or (MIXED_SIBLINGS, OTHER_SIBLINGS), rule, PROTOCOL, codec)


def first_block(codec: TokenCodec, builder: BlockBuilder, *groups: RolloutGroup) -> HindsightBlock:
    block = build_blocks(codec, builder, *groups)[0]
    assert block is not None
    return block


def teacher_texts(block: HindsightBlock, group: RolloutGroup = MIXED_SIBLINGS) -> dict[int, list[str]]:
    """What the teachers of each rollout read."""
    views = {t.rollout_index: block.views_of(t.rollout_index) for t in group.trajectories}
    return {
        index: [text for view in some for text in (view.text, view.contrast) if text is not None]
        for index, some in views.items()
    }


def numbered(labels: Sequence[Label], position: int = 0, codec: TokenCodec | None = None) -> RolloutGroup:
    """A group of rollouts with these outcomes and one query each."""
    rollouts = (searching(f"k{i}", f"query_{i}", label=label, codec=codec) for i, label in enumerate(labels))
    return siblings(*rollouts, position=position)
