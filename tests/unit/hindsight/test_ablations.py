"""Every block word for word: what each teacher reads of one group."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.blocks import (
    MIXED_SIBLINGS,
    OTHER_SIBLINGS,
    RIGHT,
    WRONG,
    build_blocks,
    first_block,
    numbered,
    searching,
    siblings,
    teacher_texts,
)
from helpers.passages import PROTOCOL, QUESTION
from sdsearch_lightning.hindsight import (
    BlockBuilder,
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
from sdsearch_lightning.losses.weights import group_weight
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.step.taught_spans import find_taught_spans
from sdsearch_lightning.types import Label, Question, RolloutGroup, SpanKind

HEADER = "\nSearch queries and outcomes of several attempts at this question:\n"


# Word for word


def test_without_labels(byte_codec: TokenCodec) -> None:
    block = first_block(byte_codec, NoLabels())
    assert block.text == (
        HEADER + "[Rollout 1]\nsearch 1: alpha\nsearch 2: beta\n[Rollout 2]\n(no search)\n"
        "[Rollout 3]\nsearch 1: gamma\n[Rollout 4]\nsearch 1: delta\n"
    )
    assert block.views is None and [entry.label for entry in block.entries] == [None] * 4


def test_correct_only(byte_codec: TokenCodec) -> None:
    block = first_block(byte_codec, CorrectOnly())
    assert block.views is None and [entry.rollout_index for entry in block.entries] == [0, 4]
    assert block.text == (
        HEADER + "[Rollout 1 | CORRECT]\nsearch 1: alpha\nsearch 2: beta\n[Rollout 2 | CORRECT]\nsearch 1: delta\n"
    )
    assert build_blocks(byte_codec, CorrectOnly(), OTHER_SIBLINGS) == [None]


def test_the_own_rollout(byte_codec: TokenCodec) -> None:
    assert teacher_texts(first_block(byte_codec, OwnRollout())) == {
        0: [HEADER + "[Rollout 1 | CORRECT]\nsearch 1: alpha\nsearch 2: beta\n"],
        1: [HEADER + "[Rollout 1 | INCORRECT]\n(no search)\n"],
        2: [],
        3: [HEADER + "[Rollout 1 | INCORRECT]\nsearch 1: gamma\n"],
        4: [HEADER + "[Rollout 1 | CORRECT]\nsearch 1: delta\n"],
    }


def test_all_but_the_own_rollout(byte_codec: TokenCodec) -> None:
    alpha, gamma, delta = "search 1: alpha\nsearch 2: beta\n", "search 1: gamma\n", "search 1: delta\n"
    first, second, third = (f"[Rollout {number} | {{}}]\n" for number in (1, 2, 3))
    assert teacher_texts(first_block(byte_codec, LeaveOneOut())) == {
        0: [
            HEADER + first.format(WRONG) + "(no search)\n" + second.format(WRONG) + gamma + third.format(RIGHT) + delta
        ],
        1: [HEADER + first.format(RIGHT) + alpha + second.format(WRONG) + gamma + third.format(RIGHT) + delta],
        2: [],
        3: [
            HEADER + first.format(RIGHT) + alpha + second.format(WRONG) + "(no search)\n" + third.format(RIGHT) + delta
        ],
        4: [
            HEADER + first.format(RIGHT) + alpha + second.format(WRONG) + "(no search)\n" + third.format(WRONG) + gamma
        ],
    }


@pytest.mark.parametrize("builder", [LeaveOneOut(), SuccessfulSibling()])
def test_a_rollout_without_siblings_has_none_to_read(byte_codec: TokenCodec, builder: BlockBuilder) -> None:
    alone = siblings(searching("k0", "alpha", label=RIGHT), searching("k1", "broken", label=None))
    assert build_blocks(byte_codec, builder, alone) == [None]


def test_unmasked_rollouts(byte_codec: TokenCodec) -> None:
    """Tags are data, so the taught rollout stays the only one with tags of its own."""
    block = first_block(byte_codec, UnmaskedRollouts())
    steps = {
        mark: "".join(
            f"< search>{query}< /search>\n\n< documents>document {mark}< /documents>\n\nrefined {mark}"
            for query in queries
        )
        for mark, queries in {"k0": ("alpha", "beta"), "k1": (), "k3": ("gamma",), "k4": ("delta",)}.items()
    }
    assert block.text == "\nSeveral attempts at this question and their outcomes:\n" + "".join(
        f"[Rollout {number} | {label}]\nthought {mark}{steps[mark]}< answer>gold {mark}< /answer>\n"
        for number, (mark, label) in enumerate(zip(steps, (RIGHT, WRONG, WRONG, RIGHT), strict=True), start=1)
    )
    assert block.views is None and [entry.rollout_index for entry in block.entries] == [0, 1, 3, 4]
    assert QUESTION.text not in block.text, "the prompt is no part of a rollout"


def test_current_documents(byte_codec: TokenCodec) -> None:
    block = first_block(byte_codec, CurrentDocuments())
    text = "\nDocuments that the next search returns:\nDoc 1(Title: title) document {} of {}\n"
    assert [(view.rollout_index, view.query_index, view.text) for view in block.views or ()] == [
        (0, 0, text.format("k0", "alpha")),
        (0, 1, text.format("k0", "beta")),
        (3, 0, text.format("k3", "gamma")),
        (4, 0, text.format("k4", "delta")),
    ]
    assert block.entries == () and block.text == ""


def test_documents_stand_before_the_query_that_returned_them(byte_codec: TokenCodec) -> None:
    block = first_block(byte_codec, CurrentDocuments())
    for trajectory in MIXED_SIBLINGS.trajectories:
        for part in find_taught_spans([(trajectory, block)], "queries"):
            (span,) = (trajectory.spans[index] for index in part.spans)
            assert span.kind is SpanKind.QUERY and f"of {byte_codec.decode(span.token_ids)}\n" in part.block_text


def test_documents_of_unclear_origin_are_told_to_nobody(byte_codec: TokenCodec) -> None:
    """A query all of whose tokens straddle its tags has no span; one that returned nothing has no documents."""
    whole = searching("k0", "alpha", "beta", label=RIGHT)
    spanless = replace(whole, spans=tuple(s for s in whole.spans if byte_codec.decode(s.token_ids) != "alpha"))
    empty = replace(whole, passages=((), whole.passages[1]))
    block = first_block(byte_codec, CurrentDocuments(), siblings(whole, spanless, empty))
    assert [(view.rollout_index, view.query_index) for view in block.views or ()] == [(0, 0), (0, 1), (2, 1)]
    assert build_blocks(byte_codec, CurrentDocuments(), siblings(spanless)) == [None]


def test_a_successful_sibling(byte_codec: TokenCodec) -> None:
    def solution(mark: str, *queries: str) -> str:
        steps = "".join(
            f"search {n}: {query}\nDoc 1(Title: title) document {mark} of {query}\n"
            for n, query in enumerate(queries, 1)
        )
        return f"\nCorrect solution:\n\n{steps}answer: gold {mark}\n\nCorrectly solve the original question.\n"

    first, last = solution("k0", "alpha", "beta"), solution("k4", "delta")
    block = first_block(byte_codec, SuccessfulSibling())
    assert teacher_texts(block) == {0: [last], 1: [first], 2: [], 3: [first], 4: [first]}
    assert [entry.rollout_index for entry in block.entries] == [0, 4]
    assert build_blocks(byte_codec, SuccessfulSibling(), OTHER_SIBLINGS) == [None], "nobody to learn from"


def test_the_lone_success_learns_nothing_of_itself(byte_codec: TokenCodec) -> None:
    lone = siblings(searching("k0", "alpha", label=WRONG), searching("k1", "beta", label=RIGHT))
    block = first_block(byte_codec, SuccessfulSibling(), lone)
    assert [view.rollout_index for view in block.views or ()] == [0]


def test_the_gold_answer(byte_codec: TokenCodec) -> None:
    block = first_block(byte_codec, GoldAnswer())
    assert (block.text, block.views, block.entries) == ("\nThe correct answer is: Paris\n", None, ())
    assert QUESTION.answers == ("Paris", "City of Light"), "the first of several"


# Shuffled labels


def shuffled(codec: TokenCodec, given: RolloutGroup, seed: int = 0) -> list[Label | None]:
    return [entry.label for entry in first_block(codec, ShuffledLabels(seed), given).entries]


@pytest.mark.parametrize("labels", [(RIGHT, WRONG), (RIGHT, WRONG, WRONG, WRONG, RIGHT), (WRONG, WRONG, WRONG, RIGHT)])
def test_labels_are_shuffled_where_they_differ(byte_codec: TokenCodec, labels: tuple[Label, ...]) -> None:
    found = {tuple(shuffled(byte_codec, numbered(labels, position))) for position in range(60)}
    assert all(sorted(row) == sorted(labels) for row in found), "drawn without replacement"
    assert labels not in found, "at least one has moved"
    num_arrangements = {2: 2, 5: 10, 4: 4}[len(labels)]
    assert len(found) == num_arrangements - 1, "and every other arrangement occurs"


def test_queries_stay_where_they_are(byte_codec: TokenCodec) -> None:
    true, told = (
        first_block(byte_codec, builder, MIXED_SIBLINGS) for builder in (QueriesAndLabels(), ShuffledLabels())
    )
    assert [e.queries for e in told.entries] == [e.queries for e in true.entries]
    assert told.text != true.text and told.text == PROTOCOL.render_block(byte_codec, told.entries)
    assert sorted(told.text) == sorted(true.text)


@pytest.mark.parametrize("label", Label)
def test_a_group_without_contrast_keeps_its_labels(byte_codec: TokenCodec, label: Label) -> None:
    given = numbered((label,) * 3)
    assert build_blocks(byte_codec, ShuffledLabels(), given) == build_blocks(byte_codec, QueriesAndLabels(), given)


def test_the_draw_depends_on_seed_and_instance_alone(byte_codec: TokenCodec) -> None:
    labels = (RIGHT, WRONG, WRONG, WRONG, RIGHT)
    groups = [numbered(labels, position) for position in range(20)]
    together = build_blocks(byte_codec, ShuffledLabels(3), *groups)
    one_by_one = [build_blocks(byte_codec, ShuffledLabels(3), given)[0] for given in reversed(groups)]
    assert together == one_by_one[::-1]
    assert together != build_blocks(byte_codec, ShuffledLabels(4), *groups)
    assert len({tuple(shuffled(byte_codec, given, 3)) for given in groups}) > 4


# The placebo


def test_a_placebo_is_the_paper_s_block_of_the_next_question(byte_codec: TokenCodec) -> None:
    third = siblings(searching("y0", "eta", label=RIGHT), position=2, question=Question("q2", "who", ("x",)))
    silent = siblings(searching("z0", label=RIGHT), position=3, question=Question("q3", "what", ("x",)))
    groups = (MIXED_SIBLINGS, OTHER_SIBLINGS, third, silent)
    true = build_blocks(byte_codec, QueriesAndLabels(), *groups)
    told = build_blocks(byte_codec, Placebo(), *groups)
    assert true[3] is told[3] is None, "no rollout of it searched: it is not taught, and lends nothing"
    for position, donor in ((0, 1), (1, 2), (2, 0)):
        own, lent = true[position], true[donor]
        assert own is not None and lent is not None
        assert told[position] == replace(lent, instance_id=own.instance_id, weight=own.weight)


def test_a_placebo_needs_another_question(byte_codec: TokenCodec) -> None:
    twin = siblings(*MIXED_SIBLINGS.trajectories, position=5)
    assert build_blocks(byte_codec, Placebo(), MIXED_SIBLINGS) == [None]
    assert build_blocks(byte_codec, Placebo(), MIXED_SIBLINGS, twin) == [None, None], "the same question twice"
    told = build_blocks(byte_codec, Placebo(), MIXED_SIBLINGS, twin, OTHER_SIBLINGS)
    assert all(block and "epsilon" in block.text for block in told[:2])


def test_the_own_outcomes_decide_whether_a_placebo_is_taught(byte_codec: TokenCodec) -> None:
    mixed, other = build_blocks(byte_codec, Placebo(), rule="mixed")
    assert other is None, "all of its own are wrong, whatever its donor's"
    assert mixed is not None and mixed.weight == 1.0 and "epsilon" in mixed.text
    (weighed,) = (b for b in build_blocks(byte_codec, Placebo(), rule="sqrt") if b)
    assert weighed.weight == group_weight([RIGHT, WRONG, WRONG, RIGHT], "sqrt")
