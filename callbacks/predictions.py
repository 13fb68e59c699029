"""PredictionLog: what `predict` found, a line per question, in their order, whichever process answered it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from sdsearch_lightning.checkpoints.writing import by_rank_0
from sdsearch_lightning.files import write_text
from sdsearch_lightning.types import StepBatch, Trajectory


class PredictionLog(Callback):
    """Writes predictions.jsonl at the end of `predict`: question, answer, queries, titles of passages, how it ended.

    Args:
        path: the file; None: predictions.jsonl in `trainer.default_root_dir`.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._rows: list[tuple[int, dict[str, Any]]] = []

    def file(self, trainer: Trainer) -> Path:
        """Where the lines go."""
        return Path(self.path) if self.path else Path(trainer.default_root_dir) / "predictions.jsonl"

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps what this process answered."""
        if isinstance(batch, StepBatch):
            found = [group.trajectories[0] for group in batch.groups or ()]
            self._rows += [(trajectory.instance_id[1], prediction(trajectory)) for trajectory in found]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gathers the rows of all processes and writes them on rank 0."""
        parts = [self._rows]
        if dist.is_available() and dist.is_initialized():
            parts = [[]] * dist.get_world_size()
            dist.all_gather_object(parts, self._rows)
        self._rows = []
        rows = sorted((row for part in parts for row in part), key=lambda row: row[0])
        lines = (json.dumps(row, ensure_ascii=False) for _, row in rows)
        by_rank_0(trainer, lambda: write_text(self.file(trainer), "".join(f"{line}\n" for line in lines)))


def prediction(trajectory: Trajectory) -> dict[str, Any]:
    """One answered question as JSON has it."""
    question = trajectory.question
    return {
        "id": question.id,
        "source": question.source,
        "question": question.text,
        "answer": trajectory.answer,
        "queries": list(trajectory.queries),
        "passages": [[passage.title for passage in found] for found in trajectory.passages],
        "stop_reason": str(trajectory.stop_reason),
    }
