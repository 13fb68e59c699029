"""The callback that fills `StepBatch.hindsight`: one block per group, by the rule, from groups that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.fits import DrawnScripts, Record, fit
from helpers.training import make_module
from helpers.training_rollouts import DIRECT, ONE, TRAINING_CODEC, TRAINING_PROTOCOL, TWO, group, rollout, three_groups
from helpers.trajectories import query_mask
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RolloutGrouping
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.hindsight import (
    BlockBudget,
    BlockBuilder,
    CorrectOnly,
    CurrentDocuments,
    GoldAnswer,
    LeaveOneOut,
    NoLabels,
    OwnRollout,
    Placebo,
    QueriesAndLabels,
    SuccessfulSibling,
    UnmaskedRollouts,
)
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.step.collate import collate, weigh
from sdsearch_lightning.types import HindsightBlock, Label, RolloutGroup, StepBatch, Trajectory


class Module:
    """What the callback needs of one; keeps what is logged."""

    protocol, codec, positions = TRAINING_PROTOCOL, TRAINING_CODEC, "queries"

    def log_dict(self, values: dict[str, float], **options: Any) -> None:
        self.logged, self.options = values, options


MODULE: Any = Module()
TRAINER: Any = SimpleNamespace(world_size=1)


def built(callback: HindsightConstruction, groups: list[RolloutGroup]) -> tuple[HindsightBlock | None, ...]:
    batch = StepBatch([g.question for g in groups])
    batch.groups = tuple(groups)
    callback.on_train_batch_start(TRAINER, MODULE, batch, 0)
    blocks: tuple[HindsightBlock | None, ...] = batch.require("hindsight", by="a test")
    return blocks


def counts() -> tuple[float, float, float]:
    """Groups without queries, groups over budget, dropped entries; of the last batch."""
    names = ("groups_without_queries", "groups_over_budget", "dropped_entries")
    assert MODULE.logged.keys() == {f"distill/{name}" for name in names}
    without, over, dropped = (MODULE.logged[f"distill/{name}"] for name in names)
    return without, over, dropped


@pytest.mark.parametrize(
    ("rule", "weights"),
    [("all", [1, 1, 1]), ("any_correct", [1, 1, 1]), ("mixed", [1, None, 1]), ("sqrt", [2 * (2 / 9) ** 0.5, None, 1])],
)
def test_one_block_per_group_by_the_rule(rule: Any, weights: list[float | None]) -> None:
    groups = three_groups()
    blocks = built(HindsightConstruction(rule), groups)
    assert [block and block.weight for block in blocks] == [w and pytest.approx(w) for w in weights]
    for g, block in zip(groups, blocks, strict=True):
        assert block is None or block.instance_id == g.instance_id
    assert blocks[0] is not None and blocks[2] is not None
    assert blocks[0].text.split() == (
        "siblings CORRECT the river ; CORRECT Norway ; INCORRECT capital of Italy ; INCORRECT none ;".split()
    )
    assert [entry.rollout_index for entry in blocks[2].entries] == [0, 2], "a failed search has no outcome"


def test_a_group_that_never_searched_is_not_taught() -> None:
    assert built(HindsightConstruction(), [group(rollout(DIRECT))]) == (None,)
    assert counts() == (1, 0, 0)
    assert built(HindsightConstruction(), [group(rollout(DIRECT)), *three_groups()])[0] is None
    assert counts() == (1, 0, 0)


def test_an_unknown_rule_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="Unknown groups rule 'some': expected one of all, any_correct, mixed, sqrt"):
        HindsightConstruction("some")  # type: ignore[arg-type]


def test_rollouts_have_to_be_there_first() -> None:
    with pytest.raises(RuntimeError, match="HindsightConstruction asked for StepBatch.groups.*RolloutGrouping"):
        HindsightConstruction().on_train_batch_start(TRAINER, MODULE, StepBatch([]), 0)


def test_a_second_construction_is_refused() -> None:
    batch = StepBatch([three_groups()[0].question])
    batch.groups = (three_groups()[0],)
    HindsightConstruction().on_train_batch_start(TRAINER, MODULE, batch, 0)
    with pytest.raises(RuntimeError, match="hindsight was already written"):
        HindsightConstruction().on_train_batch_start(TRAINER, MODULE, batch, 0)


def test_a_users_own_blocks_are_taken() -> None:
    seen: list[Any] = []

    class Placebo:
        def build(self, groups, rule, protocol, codec):  # type: ignore[no-untyped-def]
            seen.extend([rule, protocol, codec])
            return [HindsightBlock(g.instance_id, (), " none", 0.5) for g in groups]

    blocks = built(HindsightConstruction("mixed", Placebo()), three_groups())  # type: ignore[arg-type]
    assert [block and (block.text, block.weight) for block in blocks] == [(" none", 0.5)] * 3
    assert seen == ["mixed", TRAINING_PROTOCOL, TRAINING_CODEC]


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_blocks_pair_with_groups(num_blocks: int) -> None:
    class Short:
        def build(self, groups, rule, protocol, codec):  # type: ignore[no-untyped-def]
            return [None] * num_blocks

    with pytest.raises(ConfigError, match=f"for each of 3 groups, found {num_blocks} from Short.build"):
        built(HindsightConstruction(block=Short()), three_groups())  # type: ignore[arg-type]


def test_a_text_per_query_needs_queries() -> None:
    module: Any = SimpleNamespace(positions="policy")
    with pytest.raises(
        ConfigError, match="CurrentDocuments writes one text per query, but model.positions is 'policy'"
    ):
        HindsightConstruction(block=CurrentDocuments()).setup(TRAINER, module, "fit")
    HindsightConstruction(block=CurrentDocuments()).setup(TRAINER, MODULE, "fit")
    HindsightConstruction(block=LeaveOneOut()).setup(TRAINER, module, "fit")


def test_a_protocol_of_ones_own_need_not_word_every_block() -> None:
    class Bare:
        render_block, format_passages = TRAINING_PROTOCOL.render_block, TRAINING_PROTOCOL.format_passages

    module: Any = Module()
    module.protocol = Protocol.adopt(Bare())
    batch = StepBatch([g.question for g in three_groups()])
    batch.groups = tuple(three_groups())
    HindsightConstruction(block=GoldAnswer()).on_train_batch_start(TRAINER, module, batch, 0)
    assert batch.hindsight is not None
    assert [block.text for block in batch.hindsight if block] == [
        f"\nThe correct answer is: {g.question.answers[0]}\n" for g in three_groups()
    ]


# The budget. Tokens of the three blocks: header 1, then 7 + 5 + 3, 5 + 5 + 3, 7 + 3


@pytest.mark.parametrize(
    ("max_tokens", "kept", "over", "dropped"),
    [
        (None, [3, 3, 2], 0, 0),
        (16, [3, 3, 2], 0, 0),
        (15, [2, 3, 2], 0, 1),
        (13, [2, 2, 2], 0, 2),
        (12, [1, 2, 2], 0, 3),
        (8, [1, 1, 1], 0, 5),
        (7, [0, 1, 0], 2, 7),
        (1, [0, 0, 0], 3, 8),
    ],
)
def test_entries_are_dropped_from_the_end(max_tokens: int | None, kept: list[int], over: int, dropped: int) -> None:
    whole = built(HindsightConstruction(), three_groups())
    blocks = built(HindsightConstruction(max_block_tokens=max_tokens), three_groups())
    assert counts() == (0, over, dropped)
    for block, full, num_kept in zip(blocks, whole, kept, strict=True):
        assert full is not None
        entries = full.entries[:num_kept]
        text = TRAINING_PROTOCOL.render_block(TRAINING_CODEC, entries)
        assert block == (replace(full, entries=entries, text=text) if num_kept else None)
        assert max_tokens is None or block is None or len(TRAINING_CODEC.encode(block.text)) <= max_tokens


@pytest.mark.parametrize("cut", [True, False])
def test_rollouts_are_never_cut(cut: bool) -> None:
    """By the block's budget; what the teacher is not asked about, it need not read."""
    groups = three_groups()
    (block, *_) = built(HindsightConstruction(max_block_tokens=8), groups)

    def prompt(trajectory: Trajectory, text: str) -> Sequence[int]:
        return TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, trajectory.question.text, text)

    (rollouts,) = weigh(groups[:1], [block], "token-mean")
    batch = collate(rollouts, prompt, cut_teacher=cut)
    assert batch.teacher is not None
    read = [t for t in groups[0].trajectories if any(query_mask(t)) or not cut]
    assert len(read) == batch.teacher.num_sequences == (2 if cut else 3)
    for index, trajectory in enumerate(read):
        tokens = batch.teacher.token_ids[batch.teacher.sequence_index == index].tolist()
        end = max(i for i, is_query in enumerate(query_mask(trajectory)) if is_query) + 1 if cut else None
        rest = list(trajectory.token_ids[trajectory.prompt_length : end])
        assert tokens[-len(rest) :] == rest and len(tokens) == trajectory.prompt_length + 8 + len(rest)


@pytest.mark.parametrize(
    ("block", "reads", "dropped"),
    [
        (QueriesAndLabels(), [0, 1, 2], 1),
        (NoLabels(), [0, 1, 2], 1),
        (OwnRollout(), [1, 2], 1),
        (LeaveOneOut(), [0, 1, 2], 1),
        (UnmaskedRollouts(), [0, 1, 2], 1),
        (CurrentDocuments(), [0, 0, 1], 3),  # the second passage of each query
        (SuccessfulSibling(), [], 2),
        (GoldAnswer(), [], 1),
        (Placebo(), [0, 1, 2], 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BlockBuilder) else "",
)
def test_every_block_keeps_to_the_budget(block: BlockBuilder, reads: list[int], dropped: int) -> None:
    """One token less than the longest text drops one entry of it, and of each that is as long."""
    mixed, other, _ = three_groups()

    def read(budget: BlockBudget) -> list[tuple[int, int]]:
        told, _ = block.build([mixed, other], "mixed", TRAINING_PROTOCOL, TRAINING_CODEC, budget)
        views = [view for t in mixed.trajectories for view in (told.views_of(t.rollout_index) if told else ())]
        return [(view.rollout_index, len(TRAINING_CODEC.encode(view.text))) for view in views]

    free = BlockBudget()
    longest = max(length for _, length in read(free))
    assert (free.dropped_entries, free.groups_over_budget) == (0, 0)
    tight = BlockBudget(longest - 1)
    views = read(tight)
    assert [index for index, _ in views] == reads and all(length < longest for _, length in views)
    assert (tight.dropped_entries, tight.groups_over_budget) == (dropped, int(not reads))


def test_having_nothing_to_tell_is_no_matter_of_the_budget() -> None:
    wrong = group(rollout(ONE, 0, label=Label.INCORRECT), rollout(TWO, 1, label=Label.INCORRECT))
    assert built(HindsightConstruction(block=CorrectOnly(), max_block_tokens=3), [wrong]) == (None,)
    assert counts() == (0, 0, 0)


def test_a_builder_without_a_budget_cannot_have_one() -> None:
    class Simple:
        def build(self, groups, rule, protocol, codec):  # type: ignore[no-untyped-def]
            return [None for _ in groups]

    class Careful:
        def build(self, groups, rule, protocol, codec, budget):  # type: ignore[no-untyped-def]
            seen.append(budget.max_tokens)
            return [None for _ in groups]

    seen: list[int] = []
    with pytest.raises(ConfigError, match="max_block_tokens is 9, but Simple.build takes no `budget`"):
        HindsightConstruction(block=Simple(), max_block_tokens=9)  # type: ignore[arg-type]
    built(HindsightConstruction(block=Careful(), max_block_tokens=9), three_groups())  # type: ignore[arg-type]
    assert seen == [9]


@pytest.mark.parametrize("max_tokens", [0, -5])
def test_an_impossible_budget_is_refused_at_once(max_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"max_block_tokens: expected at least 1, or null, found {max_tokens}"):
        HindsightConstruction(max_block_tokens=max_tokens)


# What is logged


def test_counts_are_summed_over_ranks() -> None:
    callback, batch = HindsightConstruction(), StepBatch([three_groups()[0].question])
    batch.groups = (three_groups()[0],)
    callback.on_train_batch_start(SimpleNamespace(world_size=2), MODULE, batch, 0)  # type: ignore[arg-type]
    assert MODULE.options == {"batch_size": 1, "sync_dist": True, "reduce_fx": "sum"}


@pytest.mark.parametrize(("scripts", "expected"), [((DIRECT,), (3, 0, 0)), ((TWO,), (0, 3, 6)), ((ONE,), (0, 0, 3))])
def test_a_fit_logs_them(scripts: tuple[str, ...], expected: tuple[int, ...]) -> None:
    grouping = RolloutGrouping(group_size=2, max_tokens=160, max_turn_tokens=32, engine=DrawnScripts(*scripts))
    record = Record()
    hindsight = HindsightConstruction(max_block_tokens=7)
    fit(make_module(), grouping, hindsight, JSDWeightScheduler(1.0, 0), record, max_steps=2)
    for logged in record.metrics:
        names = ("groups_without_queries", "groups_over_budget", "dropped_entries")
        assert tuple(logged[f"distill/{name}"] for name in names) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda *_, **__: 1 / 0, "hindsight.block Mine.build fails: ZeroDivisionError: division by zero."),
        (lambda groups, *_, **__: ["a text"] * len(groups), "expected HindsightBlock or None, found str"),
    ],
)
def test_a_block_that_cannot_be_used_is_told_before_the_first_rollout(build: Any, message: str) -> None:
    class Mine:
        def build(self, groups: Any, *rest: Any, **options: Any) -> Any:
            return build(groups, *rest, **options)

    callback = HindsightConstruction(block=Mine())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        callback.on_fit_start(TRAINER, MODULE)
    HindsightConstruction().on_fit_start(TRAINER, MODULE)
