"""What the teacher reads of a group: executed queries and outcomes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from helpers.passages import PROTOCOL, QUESTION
from helpers.players import play, start
from helpers.tokenizers import EOS, IM_END
from helpers.trajectories import make_trajectory, query_mask
from sdsearch_lightning.hindsight import QueriesAndLabels, sibling_records
from sdsearch_lightning.losses.weights import GroupsRule
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.step.collate import collate, weigh
from sdsearch_lightning.types import HindsightBlock, Label, RolloutGroup, SiblingRecord, StopReason, Trajectory

RIGHT, WRONG = Label.CORRECT, Label.INCORRECT


def group(*trajectories: Trajectory) -> RolloutGroup:
    numbered = (replace(t, rollout_index=i) for i, t in enumerate(trajectories))
    return RolloutGroup(QUESTION, (0, 0), tuple(numbered))


def labelled(*labels: Label | None, script: str = "R Q O A") -> RolloutGroup:
    return group(*(make_trajectory(script, label=label) for label in labels))


def build(codec: TokenCodec, given: RolloutGroup, rule: GroupsRule = "all") -> HindsightBlock | None:
    (block,) = QueriesAndLabels().build([given], rule, PROTOCOL, codec)
    return block


MIXED = group(
    make_trajectory("R:thought_0 Q:first Q:second O:document_0 A:gold_0", label=RIGHT),
    make_trajectory("R:thought_1 A:gold_1", label=WRONG),
    make_trajectory("Q:broken O:document_2", label=None, stop_reason=StopReason.RETRIEVAL_ERROR),
    make_trajectory("R:thought_3 F:refined_3 Q:third O:document_3 A:gold_3", label=WRONG),
)


def test_records_are_queries_and_outcomes_in_rollout_order(byte_codec: TokenCodec) -> None:
    assert sibling_records(MIXED, byte_codec) == (
        SiblingRecord(0, ("first", "second"), RIGHT),
        SiblingRecord(1, (), WRONG),
        SiblingRecord(3, ("third",), WRONG),
    )


def test_the_block_holds_nothing_but_queries_and_outcomes(byte_codec: TokenCodec) -> None:
    """Thoughts, documents, refinements and answers would let the teacher read off the gold answer."""
    block = build(byte_codec, MIXED)
    assert block is not None and block.instance_id == (0, 0) and len(block.entries) == 3
    assert block.text == PROTOCOL.render_block(byte_codec, block.entries)
    assert not any(word in block.text for word in ("thought", "document", "gold", "refined", "broken"))
    assert all(word in block.text for word in ("first", "second", "third", "CORRECT", "INCORRECT", "(no search)"))


def test_an_error_without_a_stop_reason_would_be_left_out_by_its_missing_label(byte_codec: TokenCodec) -> None:
    given = group(make_trajectory(label=None), make_trajectory(label=RIGHT, stop_reason=StopReason.RETRIEVAL_ERROR))
    assert sibling_records(given, byte_codec) == ()


@pytest.mark.parametrize("query", ["a</search>", f"a {IM_END}", f"{EOS}", "<documents>", "<answer> Paris", " ", ""])
def test_a_query_that_holds_control_strings_reaches_no_teacher(byte_codec: TokenCodec, query: str) -> None:
    """Whatever engine let it through."""
    clean = make_trajectory("Q:good O A", label=RIGHT)
    hostile = replace(clean, queries=("good", query))
    assert build(byte_codec, group(clean, clean)) == build(byte_codec, group(clean, hostile))


def test_a_sibling_whose_query_holds_a_tag_changes_nothing(byte_codec: TokenCodec) -> None:
    """Neither block nor masks nor teacher prompt: the turn is a malformed action."""
    turns = ["<search>capital</search>", "<answer>Paris</answer>"]

    def taught(malformed: Sequence[str]) -> tuple[HindsightBlock, tuple[bool, ...], list[int], Trajectory]:
        student = replace(play(start(byte_codec), byte_codec, turns), label=RIGHT, advantage=1.0)
        sibling = replace(play(start(byte_codec), byte_codec, [*malformed, *turns]), label=WRONG, advantage=-1.0)
        given = group(student, sibling)
        block = build(byte_codec, given)
        assert block is not None

        def prompt(trajectory: Trajectory, text: str) -> Sequence[int]:
            return PROTOCOL.prompt_ids(byte_codec, trajectory.question.text, text)

        (rollouts,) = weigh([given], [block], "token-mean")
        batch = collate(rollouts[:1], prompt)
        assert batch.teacher is not None
        return block, query_mask(student), batch.teacher.token_ids.tolist(), sibling

    *expected, plain = taught([])
    for query in ("<answer>Paris", "a</documents>", f"a{IM_END}", "<search>a", "</think>"):
        *found, sibling = taught([f"<search>{query}</search>"])
        assert found == expected
        assert sibling.num_invalid_actions == 1
        assert sum(query_mask(sibling)) == sum(query_mask(plain)) == len("capital")


@pytest.mark.parametrize(
    ("rule", "labels", "weight"),
    [
        ("all", (WRONG, WRONG), 1.0),
        ("all", (RIGHT, RIGHT), 1.0),
        ("any_correct", (WRONG, WRONG), None),
        ("any_correct", (RIGHT, RIGHT), 1.0),
        ("mixed", (RIGHT, RIGHT), None),
        ("mixed", (RIGHT, WRONG), 1.0),
        ("mixed", (RIGHT, None), None),  # a failed search gives no contrast
        ("sqrt", (RIGHT, WRONG, WRONG, WRONG), 2 * (0.25 * 0.75) ** 0.5),
        ("sqrt", (RIGHT, RIGHT), None),
    ],
)
def test_the_rule_says_which_groups_are_taught(
    byte_codec: TokenCodec, rule: GroupsRule, labels: tuple[Label | None, ...], weight: float | None
) -> None:
    block = build(byte_codec, labelled(*labels), rule)
    assert (block and block.weight) == (weight and pytest.approx(weight))


def test_the_label_decides_not_the_reward(byte_codec: TokenCodec) -> None:
    given = group(*(make_trajectory("Q O A", label=WRONG, reward=reward) for reward in (0.0, 1.0)))
    assert given.has_signal and build(byte_codec, given, "mixed") is None


@pytest.mark.parametrize("script", ["R A", "R"])
def test_a_group_that_never_searched_has_nothing_to_tell(byte_codec: TokenCodec, script: str) -> None:
    assert build(byte_codec, labelled(RIGHT, WRONG, script=script)) is None


def test_groups_of_one_question_do_not_mix(byte_codec: TokenCodec) -> None:
    groups = [
        RolloutGroup(QUESTION, (0, i), (make_trajectory(f"Q:query_{i} O A", instance_id=(0, i), label=RIGHT),))
        for i in range(2)
    ]
    blocks = QueriesAndLabels().build(groups, "all", PROTOCOL, byte_codec)
    for i, block in enumerate(blocks):
        assert block is not None and block.instance_id == (0, i)
        assert f"query {i}" in block.text and f"query {1 - i}" not in block.text
