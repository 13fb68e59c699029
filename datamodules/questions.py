"""Where a training step begins: questions, in a seeded order that a resumed run continues exactly.

The order of an epoch depends on (seed, epoch) and on nothing else, and a step holds the same questions on any number of
processes of the same total batch size. Each question carries its instance_id, (epoch, position), which no other has.
Next: callbacks/rollout_grouping.py, which turns the StepBatch yielded here into rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch

from sdsearch_lightning.datamodules.readers import read_demonstrations, read_questions
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.types import Demonstration, InstanceId, Question, StepBatch

Row = TypeVar("Row")
Batch = TypeVar("Batch")


class SearchDataModule(pl.LightningDataModule):
    """Serves questions from files, and the retriever that answers searches about them.

    A subclass with another origin overrides `questions`, `demonstrations` and, for a from-scratch model, `vocabulary`.

    Args:
        train_files: .jsonl or .jsonl.gz of {id, question, golden_answers} or {question, answers}; one path or a list.
        val_files: the same, for validation.
        test_files: the same, for `test` and `predict`.
        demonstration_files: .jsonl or .jsonl.gz of {question, answers, turns, siblings}, for `supervise`.
        retriever: what rollouts search with: any object with `search(queries, k)`.
        batch_size: questions (or demonstrations) per process and training step.
        eval_batch_size: questions per process and evaluation batch.
        seed: decides the order of every epoch.
        limit: read at most this many rows of each file.
    """

    shuffle_demonstrations = True
    """False in a subclass whose demonstrations are a curriculum: they are then read in their own order."""

    def __init__(
        self,
        train_files: str | list[str] | None = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        demonstration_files: str | list[str] | None = None,
        retriever: Retriever | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: expected at least 1, found {value}.")
        self.files = {"train": train_files, "val": val_files, "test": test_files, "predict": test_files}
        self.demonstration_files = demonstration_files
        self.retriever = retriever
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.limit = limit
        self._read: dict[str, Sequence[Any]] = {}

    def questions(self, split: str) -> Sequence[Question]:
        """The questions of "train", "val", "test" or "predict", in a fixed order; empty where there are none."""
        return [question for path in _as_list(self.files[split]) for question in read_questions(path, self.limit)]

    def demonstrations(self) -> Sequence[Demonstration]:
        """What the cold start imitates, in a fixed order; empty where there is none."""
        return [row for path in _as_list(self.demonstration_files) for row in read_demonstrations(path, self.limit)]

    def vocabulary(self) -> tuple[str, ...] | None:
        """Words of a word-level tokenizer for a from-scratch model; None for text that needs an ordinary one."""
        return None

    def prepare_data(self) -> None:
        """Builds the index, on one process per node."""
        if (prepare := getattr(self.retriever, "prepare", None)) is not None:
            prepare()

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: a fault in a file shows before a model is loaded.

        Raises:
            ConfigError: the stage has no files.
            DataError: a file or row that cannot be used.
        """
        split = self._training_split if stage == "fit" else {"validate": "val"}.get(stage, stage)
        if not self._rows(split):
            option = {"demonstrations": "demonstration", "predict": "test"}.get(split, split) + "_files"
            raise ConfigError(f"data.{option}: expected at least one file for this command, found none.")
        if stage == "fit":
            self._rows("val")

    def teardown(self, stage: str) -> None:
        """Lets the retriever give back what it holds."""
        if (close := getattr(self.retriever, "close", None)) is not None:
            close()

    def train_dataloader(self) -> TrainingBatches[Any, Any]:
        """StepBatch by StepBatch; or, for a module that learns from demonstrations, batches of those."""
        rows, share = self._rows(self._training_split), self._share(self.batch_size)
        if self._training_split == "train":
            return TrainingBatches(rows, StepBatch, share, self.seed)
        return TrainingBatches(rows, DemonstrationBatch, share, self.seed if self.shuffle_demonstrations else None)

    @property
    def training_questions(self) -> Sequence[Question]:
        """All of them, in the order of the files; for callbacks that draw more than the loader hands out."""
        return self._rows("train")

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        """All validation questions; an empty list, which Lightning passes over, where there are none."""
        return self._evaluation("val") if self._rows("val") else []

    def test_dataloader(self) -> EvaluationBatches:
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationBatches:
        return self._evaluation("predict")

    def _evaluation(self, split: str) -> EvaluationBatches:
        return EvaluationBatches(self._rows(split), self._share(self.eval_batch_size))

    def _share(self, batch_size: int) -> Share:
        if self.trainer is None:
            return Share(batch_size)
        return Share(batch_size, self.trainer.global_rank, self.trainer.world_size)

    @property
    def _training_split(self) -> str:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return "demonstrations" if getattr(module, "learns_from", None) == "demonstrations" else "train"

    def _rows(self, split: str) -> Sequence[Any]:
        if split not in self._read:
            self._read[split] = self.demonstrations() if split == "demonstrations" else self.questions(split)
        return self._read[split]


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
        rows: the data, read by index.
        collate: makes a batch of rows and their instance ids.
        share: the part of this process.
        seed: decides the order; None reads every epoch in the order of `rows`.

    Raises:
        ConfigError: there are fewer rows than one step needs.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        collate: Callable[[list[Row], list[InstanceId]], Batch],
        share: Share,
        seed: int | None,
    ) -> None:
        if len(rows) < share.total:
            raise ConfigError(
                f"data.batch_size: expected at most {len(rows)}, the number of training rows, found {share.batch_size} "
                f"x {share.world_size} processes = {share.total}. Lower it, or give more data."
            )
        self._rows, self._collate, self._share, self._seed = rows, collate, share, seed
        self.epoch = 0
        self.batch = 0
        """Batches of the epoch that were handed out."""

    def __len__(self) -> int:
        return len(self._rows) // self._share.total

    def __iter__(self) -> Iterator[Batch]:
        if self.batch >= len(self):
            self.set_epoch(self.epoch + 1)
        order = self._order()
        while self.batch < len(self):
            positions = self._share.positions(self.batch, len(self._rows))
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
        saved = {name: state[name] for name in self._identity}
        if saved != self._identity:
            raise ConfigError(
                f"The checkpoint stands in training data with {saved}, found {self._identity}. "
                "Resume with the same data, data.seed and total batch size, or start a run under a new name."
            )
        self.epoch, self.batch = state["epoch"], state["batch"]

    @property
    def _identity(self) -> dict[str, Any]:
        return {"rows": len(self._rows), "rows_per_step": self._share.total, "seed": self._seed}

    def _order(self) -> Sequence[int]:
        if self._seed is None:
            return range(len(self._rows))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        return torch.randperm(len(self._rows), generator=generator).tolist()


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


def _as_list(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else list(files or ())
