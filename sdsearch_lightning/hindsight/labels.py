"""The paper's block with its labels removed or shuffled: what do the outcomes add to the queries?"""

from __future__ import annotations

import random
from dataclasses import replace

from sdsearch_lightning.hindsight.queries_and_labels import QueriesAndLabels
from sdsearch_lightning.types import RolloutGroup, SiblingRecord


class NoLabels(QueriesAndLabels):
    """All siblings' queries, and no outcome (paper: -1.4 points)."""

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """Every record without its label."""
        return tuple(replace(record, label=None) for record in records)


class ShuffledLabels(QueriesAndLabels):
    """All siblings' queries, each with the outcome of a sibling drawn without replacement (paper: -2.3 points).

    The draw depends on `seed` and the group's instance_id alone, so a resumed run tells the same. Where outcomes differ
    it is repeated until at least one label has moved: true labels would be no ablation. (In a group of two that leaves
    the two exchanged.) Where all outcomes are the same there is nothing to shuffle, and the block is the paper's.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def entries(self, group: RolloutGroup, records: tuple[SiblingRecord, ...]) -> tuple[SiblingRecord, ...]:
        """Every record with another one's label."""
        labels = [record.label for record in records]
        epoch, position = group.instance_id
        rng = random.Random(f"{self.seed}/shuffled-labels/{epoch}/{position}")
        shuffled = labels.copy()
        while shuffled == labels and len(set(labels)) > 1:
            rng.shuffle(shuffled)
        return tuple(replace(record, label=label) for record, label in zip(records, shuffled, strict=True))
