"""EvaluationReport: what `validate` and `test` found, as a table with intervals, over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from sdsearch_lightning.checkpoints.writing import told_by_all
from sdsearch_lightning.errors import StorageError
from sdsearch_lightning.files import GO_ON
from sdsearch_lightning.report.evaluation import SCHEMA, Evaluation, Scored, interval_facts, summarize, write_evaluation
from sdsearch_lightning.report.summary import installed_versions
from sdsearch_lightning.scoring.rewards import exact_match, f1
from sdsearch_lightning.types import RolloutGroup, StepBatch

SLOTS = ("groups", "sampled_groups")


class EvaluationReport(Callback):
    """Collects scores per question, and writes evaluation.json and evaluation.md at the end of an evaluation.

    Args:
        facts: what the file tells beside the scores: command, weights, decoding.
        folder: where to write; None: `trainer.default_root_dir`.
    """

    def __init__(self, facts: Mapping[str, Any], folder: str | None = None) -> None:
        self.facts, self.folder = dict(facts), folder
        self.result: Evaluation | None = None
        """The evaluation, on rank 0, once it has ended."""
        self._rows: dict[str, list[Scored]] = {slot: [] for slot in SLOTS}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the scores of this process."""
        for slot in SLOTS:
            if isinstance(batch, StepBatch):
                self._rows[slot] += map(scored, getattr(batch, slot) or ())

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the scores of all processes, and writes the evaluation on rank 0."""
        rows = {slot: _gathered(self._rows[slot]) for slot in SLOTS}
        self._rows = {slot: [] for slot in SLOTS}
        failure = None
        if trainer.is_global_zero:
            sampled = summarize(rows["sampled_groups"]) if rows["sampled_groups"] else None
            samples = getattr(_rollout(trainer), "eval_samples", None)
            self.result = {
                "schema": SCHEMA,
                **self.facts,
                "step": trainer.global_step,
                "interval": interval_facts(),
                **_with_data_sets(summarize(rows["groups"]), trainer),
                "sampled": sampled and {"samples": samples, **sampled},
                "versions": installed_versions(),
            }
            folder = Path(self.folder or trainer.default_root_dir)
            try:
                write_evaluation(folder, self.result)
            except OSError as error:
                failure = f"{folder} could not be written to: {error.strerror or error}"
        if (told := told_by_all(trainer, failure)) is not None:
            raise StorageError(f"{told}. {GO_ON}")

    on_test_end = on_validation_end


def scored(group: RolloutGroup) -> Scored:
    """The scores of one question, means over its rollouts."""
    golds, rollouts = group.question.answers, group.trajectories
    return Scored(
        group.instance_id[1],
        group.question.source,
        _mean(exact_match(t.answer, golds) for t in rollouts),
        _mean(f1(t.answer, golds) for t in rollouts),
        _mean(len(t.queries) for t in rollouts),
        _mean(t.answer is not None for t in rollouts),
        _mean(t.stop_reason.is_error for t in rollouts),
    )


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _gathered(rows: list[Scored]) -> list[Scored]:
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts: list[list[Scored]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def _rollout(trainer: Trainer) -> Any:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if hasattr(callback, "eval_samples")), None)


def _with_data_sets(evaluation: Evaluation, trainer: Trainer) -> Evaluation:
    """Each source with the hub's name of its data set, where it has one."""
    find = getattr(getattr(trainer, "datamodule", None), "data_set_of", lambda source: None)
    sources = [source | {"data_set": find(source["source"])} for source in evaluation["sources"]]
    return evaluation | {"sources": sources}
