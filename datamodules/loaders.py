"""Rows become batches: which rows an epoch reads, in which order, and which of them this process gets.

The order depends on (seed, epoch) and on nothing else, and a step holds the same rows on any number of processes of the
same total batch size. So a resumed run continues exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from sdsearch_lightning.datamodules.mixture import Mixture
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Demonstration, InstanceId, Question, StepBatch

Row = TypeVar("Row")
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Share:
    """The part of every batch that one process takes: each world_size-th position, from its rank on.

    Ranks never overlap, all see equally many batches, and no position depends on the number of processes.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def total(self) -> int:
        """Rows in a batch of all processes together."""
        return self.batch_size * self.world_size

    def positions(self, batch: int, num_rows: int) -> range:
        """Positions of this process in a batch; fewer, perhaps none, in the last one of `num_rows`."""
        return range(batch * self.total + self.rank, min((batch + 1) * self.total, num_rows), self.world_size)


class TrainingBatches(Generic[Row, Batch]):
    """An endless run of shuffled epochs, read through a cursor (epoch, batch) that a checkpoint keeps.

    The last batch of an epoch is left out where it would be short, so that every step holds as many questions; other
    questions are left out in the next epoch. Iterating goes on where the cursor stands; a finished epoch is followed by
    the next one. Lightning saves and restores any loader with `state_dict` and `load_state_dict`.

    Args:
        rows: the data, read by index; a Mixture where files have weights.
        collate: makes a batch of rows and their instance ids.
        share: the part of this process.
        seed: decides the order; None reads every epoch in the order of `rows`.
        fingerprint: of the contents of `rows`; a checkpoint of other contents is refused.

    Raises:
        ConfigError: there are fewer rows than one step needs.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[list[Row], list[InstanceId]], Batch],
        share: Share,
        seed: int | None,
        fingerprint: str = "",
    ) -> None:
        self._rows = Mixture.of(rows)
        self._num_rows = self._rows.rows_per_epoch
        if self._num_rows < share.total:
            raise ConfigError(
                f"data.batch_size: expected at most {self._num_rows}, the number of training rows, found "
                f"{share.batch_size} x {share.world_size} processes = {share.total}. Lower it, or give more data."
            )
        self._collate, self._share, self._seed, self._fingerprint = collate, share, seed, fingerprint
        self.epoch = 0
        self.batch = 0
        """Batches of the epoch that were handed out."""

    def __len__(self) -> int:
        return self._num_rows // self._share.total

    def __iter__(self) -> Iterator[Batch]:
        if self.batch >= len(self):
            self.set_epoch(self.epoch + 1)
        order = self._order()
        while self.batch < len(self):
            positions = self._share.positions(self.batch, self._num_rows)
            self.batch += 1  # before the yield: a checkpoint written during this step must not repeat it
            rows = [self._rows[order[position]] for position in positions]
            yield self._collate(rows, [(self.epoch, position) for position in positions])

    @property
    def sampler(self) -> TrainingBatches[Row, Batch]:
        """Itself: Lightning announces epochs to a loader's `sampler` only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Moves the cursor to the start of `epoch`, unless it stands in that epoch already (after a resume)."""
        if epoch != self.epoch:
            self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what the order depends on; the same on all ranks."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moves the cursor back to where it was saved.

        Raises:
            ConfigError: it was saved in other data or another order, which cannot be continued.
        """
        found = {name: value for name, value in self._identity.items() if state.get(name) != value}
        if set(found) == {"rows_per_step"}:
            raise ConfigError(
                f"data.batch_size: the checkpoint's steps hold {state.get('rows_per_step')} questions, found "
                f"{self._share.batch_size} x {self._share.world_size} processes = {self._share.total}. Keep the "
                "product when the number of processes changes."
            )
        if found:
            raise ConfigError(
                f"The checkpoint stands in training data with { ({name: state.get(name) for name in found}) }, found "
                f"{found}. Resume with the same files, weights, data.seed and total batch size, or start a run under a "
                "new name."
            )
        self.epoch, self.batch = state["epoch"], state["batch"]

    @property
    def _identity(self) -> dict[str, Any]:
        even, mixed = self._rows.is_even, zip(self._rows.sizes, self._rows.weights, strict=True)
        return {
            "rows": len(self._rows),
            "rows_and_weights": []
            if even
            else [list(pair) for pair in mixed],  # where even, cuts between files are free
            "rows_per_step": self._share.total,
            "seed": self._seed,
            "fingerprint": self._fingerprint,
        }

    def _order(self) -> Sequence[int]:
        indices = self._rows.indices(self._seed, self.epoch)
        if self._seed is None:
            return indices
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        return [indices[position] for position in torch.randperm(len(indices), generator=generator).tolist()]


class EvaluationBatches:
    """Every question once, in the order of the files: no row is dropped, repeated or shuffled, on any number of ranks.

    All ranks see equally many batches, since evaluation may have to meet in collectives; the last batch is short and,
    with fewer questions left than ranks, empty on some.
    """

    def __init__(self, questions: Sequence[Question], share: Share) -> None:
        self._questions, self._share = questions, share

    def __len__(self) -> int:
        return -(-len(self._questions) // self._share.total)

    def __iter__(self) -> Iterator[StepBatch]:
        for batch in range(len(self)):
            positions = self._share.positions(batch, len(self._questions))
            yield StepBatch([self._questions[position] for position in positions], [(0, p) for p in positions])


class DemonstrationBatch:
    """A list of demonstrations, but no `list`: Lightning takes those apart, and frozen dataclasses refuse that."""

    def __init__(self, demonstrations: Sequence[Demonstration], instance_ids: Sequence[InstanceId] = ()) -> None:
        self.demonstrations = tuple(demonstrations)

    def __len__(self) -> int:
        return len(self.demonstrations)

    def __iter__(self) -> Iterator[Demonstration]:
        return iter(self.demonstrations)

    def __getitem__(self, index: int) -> Demonstration:
        return self.demonstrations[index]
