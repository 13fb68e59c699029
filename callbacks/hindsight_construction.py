"""HindsightConstruction: one hindsight block per rollout group, made of its siblings' queries and outcomes.

Next: collate.py.
"""

from __future__ import annotations

import lightning.pytorch as pl

from sdsearch_lightning.hindsight import BlockBuilder, QueriesAndLabels
from sdsearch_lightning.losses import GroupsRule, group_weight
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.types import StepBatch


class HindsightConstruction(pl.Callback):
    """Fills `StepBatch.hindsight`.

    Args:
        groups: which groups are taught: all (the paper), any_correct, mixed, sqrt; see `losses.group_weight`.
        block: makes the blocks of the taught groups; null = `QueriesAndLabels`, the paper's.
    """

    def __init__(self, groups: GroupsRule = "all", block: BlockBuilder | None = None) -> None:
        super().__init__()
        group_weight([], groups)  # an unknown rule is refused here, not in the first step
        self.groups, self.block = groups, block or QueriesAndLabels()

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Build the blocks of a training batch; they cost nothing while the JSD weight is 0."""
        groups = batch.require("groups", by="HindsightConstruction")
        batch.hindsight = tuple(self.block.build(groups, self.groups, pl_module.protocol, pl_module.codec))
