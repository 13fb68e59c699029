"""HindsightConstruction: one hindsight block per rollout group, made of its siblings' queries and outcomes.

Next: step/collate.py.
"""

from __future__ import annotations

import inspect
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.hindsight import BlockBudget, BlockBuilder, QueriesAndLabels, sibling_records
from sdsearch_lightning.losses.weights import GroupsRule, group_weight
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.scoring.scoring import made_up_rollouts
from sdsearch_lightning.types import Label, Question, RolloutGroup, StepBatch


class HindsightConstruction(pl.Callback):
    """Makes the text that the teacher of each group reads: fills `StepBatch.hindsight`.

    Args:
        groups: which groups are taught, by the share p of their CORRECT rollouts: all (the paper), any_correct (p above
            0), mixed (p between 0 and 1), sqrt (all, with weight 2 sqrt(p (1 - p))). A group in which no rollout
            searched never is.
        block: makes the text that the teacher reads; null: QueriesAndLabels, the paper's.
        max_block_tokens: whole entries are dropped from the end of a block until it has at most so many tokens; a group
            whose first entry alone is longer is not taught. Both are logged. Rollouts are never cut. null: no limit.
    """

    writes_hindsight = True
    """For others, which look for such a callback."""

    def __init__(
        self, groups: GroupsRule = "all", block: BlockBuilder | None = None, max_block_tokens: int | None = None
    ) -> None:
        super().__init__()
        group_weight([], groups)  # an unknown rule is refused here, not in the first step
        BlockBudget(max_block_tokens)  # and so is an impossible budget
        self.groups, self.max_block_tokens = groups, max_block_tokens
        self.block = BlockBuilder.adopt(block or QueriesAndLabels())
        if max_block_tokens is not None and "budget" not in inspect.signature(self.block.build).parameters:
            raise ConfigError(
                f"hindsight.max_block_tokens is {max_block_tokens}, but {type(self.block).__name__}.build takes no "
                "`budget`. Add the parameter (see BlockBuilder.build), or set max_block_tokens to null."
            )

    def setup(self, trainer: pl.Trainer, pl_module: SDSearchModule, stage: str) -> None:  # type: ignore[override]
        """Refuse a block that has nothing to say where the teacher is asked."""
        if self.block.per_query and pl_module.positions != "queries":
            raise ConfigError(
                f"hindsight.block {type(self.block).__name__} writes one text per query, but model.positions is "
                f"{pl_module.positions!r}: there is nothing to read at other tokens. Set model.positions to queries."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: SDSearchModule) -> None:  # type: ignore[override]
        """Try the block on a made-up group, before time is spent on rollouts; warn where no weight makes it count."""
        callbacks = trainer.callbacks if isinstance(pl_module, SDSearchModule) else []  # type: ignore[attr-defined]
        has_weight = any(hasattr(callback, "sets_jsd_weight") for callback in callbacks)
        if callbacks and not has_weight and not pl_module.jsd_weight:
            rank_zero_warn(
                "hindsight: no JSDWeightScheduler is among the trainer's callbacks, so the JSD weight stays 0 and "
                "nothing is distilled. Add it after HindsightConstruction."
            )
        right, wrong = made_up_rollouts(Question("made-up", "where is it", ("there",)))
        rollouts = replace(right, label=Label.CORRECT, reward=1.0), replace(wrong, label=Label.INCORRECT, reward=0.0)
        group, name = RolloutGroup(right.question, right.instance_id, rollouts), type(self.block).__name__
        try:
            blocks = self.block.build([group], self.groups, pl_module.protocol, pl_module.codec)
        except SDSearchError:
            raise
        except Exception as error:
            raise ConfigError(f"hindsight.block {name}.build fails: {type(error).__name__}: {error}.") from error
        strangers = [type(block).__name__ for block in blocks if block is not None and not hasattr(block, "views_of")]
        if strangers:
            raise ConfigError(f"hindsight.block {name}.build: expected HindsightBlock or None, found {strangers[0]}.")

    def on_train_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Build the blocks of a training batch; they cost nothing while the JSD weight is 0."""
        groups = batch.require("groups", by="HindsightConstruction")
        budget = BlockBudget(self.max_block_tokens)
        options = {} if self.max_block_tokens is None else {"budget": budget}
        blocks = self.block.build(groups, self.groups, pl_module.protocol, pl_module.codec, **options)
        if len(blocks) != len(groups):
            raise ConfigError(
                f"hindsight.block: expected one block or None for each of {len(groups)} groups, found {len(blocks)} "
                f"from {type(self.block).__name__}.build."
            )
        batch.hindsight = tuple(blocks)
        searched = [any(record.queries for record in sibling_records(group, pl_module.codec)) for group in groups]
        counts = {
            "distill/groups_without_queries": float(searched.count(False)),
            "distill/groups_over_budget": float(budget.groups_over_budget),
            "distill/dropped_entries": float(budget.dropped_entries),
        }
        pl_module.log_dict(counts, batch_size=len(groups), sync_dist=trainer.world_size > 1, reduce_fx="sum")
