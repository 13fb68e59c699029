"""Scores of finished rollouts, as a torchmetrics metric.

Invariant: every rollout counts, also one without an answer or with a failed search (it scores 0 and shows in its rate).
Sums are integers, so the result is the same for any batch size, order and number of ranks, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from sdsearch_lightning.scoring.rewards import exact_match, f1, substring_match
from sdsearch_lightning.types import Trajectory

_SHARE = 1 << 40
"""Fixed point of the sums: an F1 is kept to 5e-13, and 8 million rollouts fit an int64."""


class RolloutScores(Metric):
    """Accuracy and behaviour over rollouts; one instance per data source and decoding.

    `compute()` gives float64 scalars on the CPU:

        exact_match, f1, substring_match   means over rollouts, in [0, 1]
        searches_per_question              executed searches per rollout
        valid_action_rate                  (searches + answers) / (searches + answers + invalid actions); no action: 0
        answered_rate, truncated_rate      share with an answer; share ended by a budget
        retrieval_error_rate               share ended by a failed search
        questions                          rollouts scored; the questions themselves at one rollout each

    Args:
        sync_on_compute: whether `compute()` is over all ranks, and so a collective; else over what this one saw.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    sums: Tensor

    _columns = (
        "f1",
        "exact_match",
        "substring_match",
        "answered",
        "truncated",
        "errors",
        "searches",
        "invalid",
        "rows",
    )

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("sums", torch.zeros(len(self._columns), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, trajectories: Iterable[Trajectory]) -> None:
        """Count finished rollouts in; an empty batch is welcome (a rank without questions)."""
        rows = [self._row(trajectory) for trajectory in trajectories]
        self.sums += torch.tensor([sum(column) for column in zip(*rows, strict=True)] or [0], device=self.sums.device)

    @staticmethod
    def _row(trajectory: Trajectory) -> tuple[int, ...]:
        answer, stop = trajectory.answer, trajectory.stop_reason
        golds, rule = trajectory.question.answers, trajectory.question.normalization
        return (
            round(f1(answer, golds, rule) * _SHARE),
            int(exact_match(answer, golds, rule)),
            int(substring_match(answer, golds, rule)),
            int(answer is not None),
            int(stop.is_truncated),
            int(stop.is_error),
            len(trajectory.queries),
            trajectory.num_invalid_actions,
            1,
        )

    def compute(self) -> dict[str, Tensor]:
        """All scores so far, over all ranks."""
        total = dict(zip(self._columns, self.sums.tolist(), strict=True))
        rows, valid = max(total["rows"], 1), total["searches"] + total["answered"]
        scores = {
            "exact_match": total["exact_match"] / rows,
            "f1": total["f1"] / _SHARE / rows,
            "substring_match": total["substring_match"] / rows,
            "searches_per_question": total["searches"] / rows,
            "valid_action_rate": valid / max(valid + total["invalid"], 1),
            "answered_rate": total["answered"] / rows,
            "truncated_rate": total["truncated"] / rows,
            "retrieval_error_rate": total["errors"] / rows,
            "questions": total["rows"],
        }
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in scores.items()}
