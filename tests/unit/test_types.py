"""The one carrier that changes: each slot has one writer and is written once."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.passages import QUESTION
from helpers.trajectories import make_trajectory
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, StepBatch

GROUP = RolloutGroup(QUESTION, (0, 0), (make_trajectory(),))
VALUES: dict[str, Any] = {
    "groups": (GROUP,),
    "sampled_groups": (GROUP,),
    "hindsight": (HindsightBlock((0, 0), (), "told"),),
    "credit": ((None,),),
}
WRITERS = {
    "groups": ("RolloutGrouping", "rollout:"),
    "sampled_groups": ("RolloutGrouping", "rollout: (with eval_samples above 0)"),
    "hindsight": ("HindsightConstruction", "hindsight:"),
    "credit": ("SDSearchModule", "model:"),
}


def filled() -> StepBatch:
    batch = StepBatch([QUESTION], [(0, 0)])
    batch.groups = VALUES["groups"]
    return batch


def test_a_new_batch_holds_questions_only() -> None:
    batch = StepBatch([QUESTION, QUESTION])
    assert len(batch) == 2 and batch.questions == (QUESTION, QUESTION)
    assert batch.instance_ids == ((0, 0), (0, 1))  # a question twice is two instances
    assert all(getattr(batch, slot) is None for slot in VALUES)
    with pytest.raises(AssertionError, match="one instance id per question"):
        StepBatch([QUESTION], [(0, 0), (0, 1)])


@pytest.mark.parametrize("slot", VALUES)
def test_a_slot_that_nobody_filled_names_its_writer_and_its_group(slot: str) -> None:
    writer, group = WRITERS[slot]
    with pytest.raises(RuntimeError) as caught:
        StepBatch([QUESTION]).require(slot, by="TrajectoryLog")
    assert str(caught.value) == (
        f"TrajectoryLog asked for StepBatch.{slot}, which is None: {writer} has to fill it first. "
        f"Is the callback (in a file: {group}) there, and in the order rollout, hindsight, jsd?"
    )


@pytest.mark.parametrize("slot", VALUES)
def test_a_slot_is_written_once(slot: str) -> None:
    batch = filled() if slot != "groups" else StepBatch([QUESTION])
    setattr(batch, slot, VALUES[slot])
    assert batch.require(slot, by="anyone") is VALUES[slot]
    with pytest.raises(
        RuntimeError, match=rf"StepBatch.{slot} was already written: {WRITERS[slot][0]} is its one writer"
    ):
        setattr(batch, slot, VALUES[slot])


def test_hindsight_before_rollouts_is_refused() -> None:
    batch = StepBatch([QUESTION])
    with pytest.raises(RuntimeError, match="HindsightConstruction asked for StepBatch.groups, which is None"):
        batch.hindsight = VALUES["hindsight"]
    assert batch.hindsight is None


def test_a_group_refuses_rollouts_of_another_instance() -> None:
    with pytest.raises(AssertionError, match=r"group \(0, 0\) was given rollouts of \[\(0, 1\)\]"):
        RolloutGroup(QUESTION, (0, 0), (make_trajectory(), make_trajectory(instance_id=(0, 1))))
