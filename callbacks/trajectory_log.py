"""TrajectoryLog: every rollout of a run, with what the teacher said of it, as lines of trajectories.jsonl.

It reads the slots of `StepBatch` and writes none; a line is complete on disk when its batch ends. The format and its
reader live in `sdsearch_lightning/report/trajectories.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from sdsearch_lightning.checkpoints.writing import told_by_all
from sdsearch_lightning.errors import ConfigError, StorageError
from sdsearch_lightning.files import GO_ON
from sdsearch_lightning.report.segments import close_segment
from sdsearch_lightning.report.trajectories import Record, append_records, cut_torn_line, make_record, rank_file
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, StepBatch, Trajectory


class TrajectoryLog(Callback):
    """Appends one JSON line per rollout to `runs/<name>/trajectories.jsonl`.

    Steps are those of metrics.csv: rollouts of the n-th training batch stand under step n, those of an evaluation under
    the number of batches trained on before it. Rank r > 0 writes `trajectories.rank<r>.jsonl`.

    Args:
        path: file to append to; None: trajectories.jsonl in the run folder (`trainer.default_root_dir`).
        every_n_steps: write the rollouts of every n-th training step, the first included.
        max_per_step: at most this many rollouts per training step and rank; None: all of them.
        val_questions: a validation between the first and the last of a `fit` writes only its first so many questions,
            so that a few are followed through the run; None: all. The first and the last validation, and `validate`,
            `test` and `predict`, write every rollout.
        top_tokens: how many of the teacher's most probable tokens to write per query token.
        segment_mb: a file that has grown to so many MB is packed into `trajectories.00001.jsonl.gz` and so on, and
            begins anew; None: never.
    """

    def __init__(
        self,
        path: str | None = None,
        every_n_steps: int = 1,
        max_per_step: int | None = None,
        val_questions: int | None = 16,
        top_tokens: int = 5,
        segment_mb: float | None = 64,
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(
                f"every_n_steps: expected 1 or more, got {every_n_steps}; leave the callback out to log nothing."
            )
        if segment_mb is not None and not segment_mb > 0:
            raise ConfigError(f"segment_mb: expected a size above 0 MB or null for no segments, got {segment_mb}.")
        self.path = path
        self.every_n_steps = every_n_steps
        self.max_per_step = max_per_step
        self.val_questions = val_questions
        self.top_tokens = top_tokens
        self.segment_mb = segment_mb
        self._file: Path | None = None
        self._failure: str | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes the rollouts of a training batch; all of them, as phase "skipped", where its update was not finite."""
        step = trainer.global_step  # Lightning has already counted this batch
        if _has_rollouts(batch) and batch.skipped_updates:
            self._append(trainer, self._records(trainer, pl_module, batch, batch.groups, "skipped", step))
            rank_zero_warn(
                f"Step {step}: the gradient was not finite, so {batch.skipped_updates} update(s) were skipped and no "
                'weight changed. The batch is in trajectories.jsonl, phase "skipped".'
            )
        if _has_rollouts(batch) and (step - 1) % self.every_n_steps == 0:
            records = self._records(trainer, pl_module, batch, batch.groups, "train", step)
            self._append(trainer, islice(records, self.max_per_step))
        self._raise_together(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run, on all ranks, where one could not write."""
        self._raise_together(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run, on all ranks, where one could not write."""
        self._raise_together(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run, on all ranks, where one could not write."""
        self._raise_together(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rollouts of a validation batch; a sanity check counts as the validation of its step."""
        self._evaluation(trainer, pl_module, batch, "val", None if _is_whole(trainer) else self.val_questions)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rollouts of a test batch."""
        self._evaluation(trainer, pl_module, batch, "test", None)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the rollouts of a prediction batch."""
        self._evaluation(trainer, pl_module, batch, "predict", None)

    def _evaluation(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, phase: str, questions: int | None
    ) -> None:
        if not _has_rollouts(batch):
            return
        for name, groups in ((phase, batch.groups), (f"{phase}_sampled", batch.sampled_groups or ())):
            # By position in the whole evaluation: the same questions each time, on any number of ranks.
            chosen = [group for group in groups if questions is None or group.instance_id[1] < questions]
            self._append(trainer, self._records(trainer, pl_module, batch, chosen, name, trainer.global_step))

    def _records(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: StepBatch,
        groups: tuple[RolloutGroup, ...] | list[RolloutGroup],
        phase: str,
        step: int,
    ) -> Iterator[Record]:
        tokenizer: Any = pl_module.tokenizer
        decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        is_taught = phase == "train"  # hindsight and credit belong to the groups of a training step
        for index, group in enumerate(groups):
            block = batch.hindsight[index] if is_taught and batch.hindsight else None
            credits = batch.credit[index] if is_taught and batch.credit else (None,) * len(group.trajectories)
            for trajectory, credit in zip(group.trajectories, credits, strict=True):
                yield make_record(
                    trajectory,
                    decode,
                    phase=phase,
                    step=step,
                    rank=trainer.global_rank,
                    block=_block_text(block, trajectory),
                    credit=credit,
                    top_tokens=self.top_tokens,
                )

    def _append(self, trainer: Trainer, records: Iterator[Record]) -> None:
        path = Path(self.path) if self.path else Path(trainer.default_root_dir) / "trajectories.jsonl"
        file = rank_file(path, trainer.global_rank)
        try:
            if self._file is None:
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.exists():
                    cut_torn_line(file)
                self._file = file
            append_records(file, records)
            if self.segment_mb is not None and file.stat().st_size >= self.segment_mb * 1e6:
                close_segment(file)
        except OSError as error:  # raised where all ranks meet: batches of an evaluation are not as many on each
            self._failure = self._failure or f"{file} could not be written: {error.strerror or error}"

    def _raise_together(self, trainer: Trainer) -> None:
        if (told := told_by_all(trainer, self._failure)) is not None:
            raise StorageError(f"{told}. {GO_ON}")


def _has_rollouts(batch: Any) -> bool:
    """Whether the batch holds rollouts; those of a cold start are demonstrations."""
    return isinstance(batch, StepBatch) and batch.groups is not None


def _block_text(block: HindsightBlock | None, trajectory: Trajectory) -> str | None:
    """What a rollout's teacher read, its views one after the other, contrasts too; None where it had no teacher."""
    views = block.views_of(trajectory.rollout_index) if block is not None else ()
    return "".join(text for view in views for text in (view.text, view.contrast) if text) if views else None


def _is_whole(trainer: Trainer) -> bool:
    """Whether a validation is written whole: outside `fit`, and the first and the last one of it."""
    if trainer.state.fn != TrainerFn.FITTING or trainer.global_step == 0 or trainer.should_stop:
        return True
    return not trainer.sanity_checking and trainer.global_step >= trainer.estimated_stepping_batches
