"""The callback that fills `StepBatch.hindsight`: one block per group, by the rule, from groups that are there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from training_data import CODEC, DIRECT, PROTOCOL, group, rollout, three_groups

from sdsearch_lightning.callbacks import HindsightConstruction
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, StepBatch

MODULE: Any = SimpleNamespace(protocol=PROTOCOL, codec=CODEC)
TRAINER: Any = None


def built(callback: HindsightConstruction, groups: list[RolloutGroup]) -> tuple[HindsightBlock | None, ...]:
    batch = StepBatch([g.question for g in groups])
    batch.groups = tuple(groups)
    callback.on_train_batch_start(TRAINER, MODULE, batch, 0)
    blocks: tuple[HindsightBlock | None, ...] = batch.require("hindsight", by="a test")
    return blocks


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
    assert seen == ["mixed", PROTOCOL, CODEC]
