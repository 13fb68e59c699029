"""What a step's rollouts tell is of this rank: nothing is gathered on the CPU, where NCCL has no backend."""

from __future__ import annotations

from typing import Any

import pytest
import torchmetrics.metric

from helpers.trajectories import make_trajectory
from sdsearch_lightning.rollout.metrics import rollout_metrics
from sdsearch_lightning.scoring.scores import RolloutScores
from sdsearch_lightning.types import RolloutGroup


def test_nothing_is_gathered_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(*_: Any, **__: Any) -> None:
        raise RuntimeError("No backend type associated with device type cpu")

    monkeypatch.setattr(torchmetrics.metric, "jit_distributed_available", lambda: True)
    monkeypatch.setattr(torchmetrics.metric, "gather_all_tensors", gather)
    trajectory = make_trajectory()
    group = RolloutGroup(trajectory.question, trajectory.instance_id, (trajectory,))
    assert "rollout/exact_match" in rollout_metrics([group])
    scores = RolloutScores()
    scores.update(group.trajectories)
    with pytest.raises(RuntimeError, match="No backend type"):
        scores.compute()
