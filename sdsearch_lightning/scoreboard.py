"""Scores of one evaluation, per source and decoding, exact over ranks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from sdsearch_lightning.evaluation import RolloutScores
from sdsearch_lightning.types import Trajectory


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
