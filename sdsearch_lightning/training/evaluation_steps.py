"""Evaluation steps: the rollouts are there already, so a step is a count.

Scores are kept per source and decoding, and are exact over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from sdsearch_lightning.scoring.scores import RolloutScores
from sdsearch_lightning.training.predictions import Predictions
from sdsearch_lightning.types import StepBatch, Trajectory


class ScoreBoard:
    """Collects finished rollouts under names such as `val`, `val_sampled` or `test/hotpotqa`."""

    def __init__(self) -> None:
        self._scores: dict[str, RolloutScores] = {}

    def reset(self) -> None:
        """Forget everything; at the start of an evaluation."""
        self._scores = {}

    def update(self, name: str, trajectories: Iterable[Trajectory], device: torch.device | str = "cpu") -> None:
        """Count finished rollouts under `name`."""
        if name not in self._scores:
            self._scores[name] = RolloutScores().to(device)
        self._scores[name].update(trajectories)

    def compute(self, device: torch.device | str = "cpu") -> dict[str, dict[str, float]]:
        """Scores by name, over all ranks; a collective. A name that this rank never saw counts nothing here."""
        names = set(self._scores)
        if dist.is_available() and dist.is_initialized():
            everyone: list[set[str]] = [set()] * dist.get_world_size()
            dist.all_gather_object(everyone, names)
            names = set().union(*everyone)
        for name in names - set(self._scores):
            self.update(name, [], device)
        return {name: {k: float(v) for k, v in self._scores[name].compute().items()} for name in sorted(names)}


class EvaluationSteps(pl.LightningModule):
    """`validate`, `test` and `predict` of a module whose rollouts a callback has run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scores = ScoreBoard()

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Count greedy rollouts as `val`, sampled ones as `val_sampled`."""
        self._count("val", batch, by_source=False)

    def test_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Count greedy and sampled rollouts, apart for each source of questions."""
        self._count("test", batch, by_source=True)

    def predict_step(self, batch: StepBatch, batch_idx: int) -> Predictions:
        """The rollouts of the batch."""
        return Predictions(batch.require("groups", by="SDSearchModule.predict_step"), batch.sampled_groups)

    def _count(self, phase: str, batch: StepBatch, by_source: bool) -> None:
        for slot, prefix in (("groups", ""), ("sampled_groups", "sampled_")):
            if slot == "sampled_groups" and batch.sampled_groups is None:
                continue
            for group in batch.require(slot, by=f"SDSearchModule.{phase}"):
                name = f"{phase}/{group.question.source}/{prefix}" if by_source else f"{phase}/{prefix}"
                self.scores.update(name, group.trajectories, self.device)

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the evaluation before."""
        self.scores.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the scores of all ranks."""
        scores = self.scores.compute(self.device)
        metrics = {f"{name}{key}": value for name, keys in scores.items() for key, value in keys.items()}
        # Lightning would log a validation inside `fit` one step early; `step` is its key for saying so.
        self.log_dict(metrics | {"step": float(self.trainer.global_step)})

    on_test_epoch_end = on_validation_epoch_end
