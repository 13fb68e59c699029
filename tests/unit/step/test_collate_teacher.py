"""The teacher's side of a micro-batch: the block, then the same tokens, as far as the teacher is asked about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from helpers.training_rollouts import (
    DIRECT,
    ONE,
    TRAINING_CODEC,
    TRAINING_PASSAGES,
    TRAINING_PROTOCOL,
    TWO,
    blocks_of,
    group,
    rollout,
    three_groups,
)
from helpers.trajectories import query_mask
from sdsearch_lightning.step.collate import SearchBatch, WeightedRollout, collate, weigh
from sdsearch_lightning.types import RolloutGroup, TeacherView, Trajectory


def teacher_prompt(trajectory: Trajectory, block_text: str) -> Sequence[int]:
    return TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, trajectory.question.text, block_text)


def flat(groups: Sequence[Sequence[WeightedRollout]]) -> list[WeightedRollout]:
    return [rollout for group in groups for rollout in group]


def collated(groups: Sequence[RolloutGroup], with_teacher: bool = True, cut: bool = True) -> SearchBatch:
    weighed = weigh(groups, blocks_of(groups), "token-mean", dtype=torch.float64)
    return collate(flat(weighed), teacher_prompt if with_teacher else None, dtype=torch.float64, cut_teacher=cut)


@pytest.mark.parametrize("cut", [True, False])
def test_the_teacher_reads_the_block_and_then_the_same_tokens(cut: bool) -> None:
    """Cut: to the last query, and nothing of a rollout without one; uncut: all that the student has."""
    groups = three_groups()
    blocks, batch = blocks_of(groups), collated(groups, cut=cut)
    assert batch.teacher is not None and batch.teacher_query_row is not None
    expected, rows, shared = [], [], []
    for g, block in zip(groups, blocks, strict=True):
        first = True
        for t in g.trajectories:
            if t.label is not None and block is not None and (any(query_mask(t)) or not cut):
                prompt = TRAINING_CODEC.encode(t.question.text + block.text)
                end = max(i for i, is_query in enumerate(query_mask(t)) if is_query) + 1 if cut else len(t.token_ids)
                shift = len(expected) + len(prompt) - t.prompt_length
                rows += [shift + i for i, is_query in enumerate(query_mask(t)) if is_query]
                expected += [*prompt, *t.token_ids[t.prompt_length : end]]
                shared.append(0 if first else len(prompt))
                first = False
    assert batch.teacher.token_ids.tolist() == expected
    assert batch.teacher_query_row.tolist() == rows
    assert batch.teacher.shared == tuple(shared) and batch.sequences.shared == (0, 4, 4, 0, 4, 4, 0, 4)
    assert torch.equal(batch.teacher.token_ids[batch.teacher_query_row], batch.token_ids[batch.query_row])
    assert len(expected) == (158 if cut else 326), "a cut teacher reads less than half"


def test_a_cut_teacher_drawn_as_tokens() -> None:
    """One query of three, then one of two and one of one; the third rollout asked nothing."""
    batch = collated(three_groups()[:1])
    assert batch.teacher is not None and batch.teacher_query_row is not None
    block = "siblings CORRECT the river ; CORRECT Norway ; INCORRECT capital of Italy ; INCORRECT none ;"
    found = f"<documents> {TRAINING_PASSAGES[0].contents} {TRAINING_PASSAGES[1].contents} </documents>"
    drawn = [
        f"where is Rome Rome {block} <search> [the river] </search> {found} <think> Oslo </think> <search> [Norway]",
        f"where is Rome Rome {block} <think> where </think> <search> [capital of Italy]",
    ]
    words = " ".join(drawn).split()
    assert TRAINING_CODEC.decode(batch.teacher.token_ids.tolist()).split() == [word.strip("[]") for word in words]
    assert batch.teacher.lengths == tuple(len(row.split()) for row in drawn)
    inside = [i for i in range(len(words)) if "[" in words[i] or "]" in words[i] or words[i - 1] == "[capital"]
    assert batch.teacher_query_row.tolist() == inside


def test_a_view_of_one_query_is_cut_at_that_query() -> None:
    groups = [group(rollout(TWO), rollout(ONE, 1))]
    (plain,) = blocks_of(groups)
    assert plain is not None
    views = (TeacherView(0, 0, " siblings ;"), TeacherView(0, 1, " siblings none ;"))
    (rollouts,) = weigh(groups, [replace(plain, views=views)], "token-mean")
    batch, uncut = (collate(rollouts, teacher_prompt, cut_teacher=cut) for cut in (True, False))
    assert batch.teacher is not None and uncut.teacher is not None
    ends = [i + 1 for i in batch.query_row.tolist()][1:3]  # after "river" and "Norway"
    assert batch.teacher.lengths == (ends[0] + 2, ends[1] + 3)
    assert uncut.teacher.lengths == (47 + 2, 47 + 3)
    assert torch.equal(batch.query_row, uncut.query_row)


def test_a_teacher_of_all_positions_is_cut_at_the_last_token_of_the_policy() -> None:
    groups = [group(rollout(TWO), rollout(DIRECT, 1))]
    rollouts = flat(weigh(groups, blocks_of(groups), "token-mean", positions="policy"))
    batch, uncut = (collate(rollouts, teacher_prompt, "policy", cut_teacher=cut) for cut in (True, False))
    assert batch.teacher is not None and uncut.teacher is not None
    assert batch.teacher.lengths == uncut.teacher.lengths, "the last token of a rollout is the policy's"
    assert len(batch.query_row) == sum(sum(t.policy_mask) for t in groups[0].trajectories)


def test_a_prompt_with_its_block_is_made_once_for_a_group() -> None:
    groups, asked = three_groups(), []

    def prompt(trajectory: Trajectory, block_text: str) -> Sequence[int]:
        asked.append((trajectory.instance_id, block_text))
        return teacher_prompt(trajectory, block_text)

    blocks = blocks_of(groups)
    batch = collate(flat(weigh(groups, blocks, "token-mean")), prompt)
    assert asked == [(g.instance_id, block.text) for g, block in zip(groups, blocks, strict=True) if block is not None]
    assert batch.teacher is not None and batch.teacher.num_sequences == 5


@pytest.mark.parametrize(("cut", "num_sequences"), [(True, 2 + 1), (False, 3 + 2)])
def test_only_taught_groups_have_a_teacher(cut: bool, num_sequences: int) -> None:
    groups = three_groups()
    blocks = blocks_of(groups, "mixed")
    assert blocks[1] is None
    batch = collate(flat(weigh(groups, blocks, "token-mean")), teacher_prompt, cut_teacher=cut)
    assert batch.teacher is not None and batch.teacher.num_sequences == num_sequences
    assert len(batch.query_row) == len(batch.query_weight) == 3 + 3 + 3
    untaught = collated(groups, with_teacher=False)
    assert untaught.teacher is None and len(untaught.query_row) == 0
    nothing_asked = [group(rollout(DIRECT))]
    assert blocks_of(nothing_asked) == [None]
    assert collated(nothing_asked).teacher is None
