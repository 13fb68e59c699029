"""CreditDiagnostics: where the good queries stand, and whether the teacher knows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.scoring.query_credit import AnswerEvidence, QueryCredit, assigned
from sdsearch_lightning.types import Label, RolloutGroup, SpanKind, StepBatch, TokenCredit, Trajectory

AREAS = {
    "mixed": "credit/auc_mixed",
    "all_correct": "credit/auc_all_correct",
    "all_incorrect": "credit/auc_all_incorrect",
}
"""By kind of group, which is by the outcomes of its rollouts."""


class JudgedQuery(NamedTuple):
    """One executed query of a training step."""

    kind: str
    """Of its group; see AREAS."""
    is_correct: bool
    """Whether its rollout is CORRECT."""
    is_good: bool
    log_ratio: float | None
    """Mean of log teacher / student over its tokens; None where no teacher read it."""


class CreditDiagnostics(pl.Callback):
    """Logs `credit/*` after each step: what GRPO's one number per rollout hides, and what the teacher could tell.

    Args:
        evidence: a query is good where this gives it more than 0; null: the run's own `rollout.credit`, or
            AnswerEvidence where there is none. One that asks the policy (`read`) does for the former only.
    """

    def __init__(self, evidence: QueryCredit | None = None) -> None:
        super().__init__()
        self.evidence = None if evidence is None else QueryCredit.adopt(evidence)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse evidence that the training questions have none of: every query would count as bad."""
        asked = getattr(getattr(trainer, "datamodule", None), "training_questions", None)
        if stage == "fit" and self.evidence is not None and asked:
            self.evidence.check_questions(asked)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: SDSearchModule,  # type: ignore[override]
        outputs: Any,
        batch: StepBatch,
        batch_idx: int,
    ) -> None:
        """Measure the queries of the step that just ended; sums over all ranks."""
        queries = list(judged_queries(batch.groups or (), batch.credit, self.evidence))
        sums = {"good": 0.0, "good_in_incorrect": 0.0, "in_correct": 0.0, "lucky": 0.0}
        for query in queries:
            sums["good"] += query.is_good
            sums["good_in_incorrect"] += query.is_good and not query.is_correct
            sums["in_correct"] += query.is_correct
            sums["lucky"] += query.is_correct and not query.is_good
        for kind in AREAS:
            won, pairs = ranked_pairs([q for q in queries if q.kind == kind and q.log_ratio is not None])
            sums |= {f"won_{kind}": won, f"pairs_{kind}": float(pairs)}
        totals = pl_module.sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64))
        pl_module.log_dict(_shares(dict(zip(sums, totals.tolist(), strict=True))), batch_size=len(batch))


def _shares(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of what there was something of."""
    parts = {
        "credit/good_in_incorrect": (sums["good_in_incorrect"], sums["good"]),
        "credit/lucky_in_correct": (sums["lucky"], sums["in_correct"]),
        **{name: (sums[f"won_{kind}"], sums[f"pairs_{kind}"]) for kind, name in AREAS.items()},
    }
    return {name: part / whole for name, (part, whole) in parts.items() if whole}


def judged_queries(
    groups: Sequence[RolloutGroup],
    credit: Sequence[Sequence[tuple[TokenCredit, ...] | None]] | None,
    evidence: QueryCredit | None,
) -> Iterator[JudgedQuery]:
    """All executed queries of rollouts with an outcome.

    Args:
        groups: of a step.
        credit: the teacher's verdict, as `StepBatch.credit` holds it; None without a teacher.
        evidence: see `CreditDiagnostics`.
    """
    for index, group in enumerate(groups):
        labels = {t.label for t in group.trajectories if t.label is not None}
        kind = "mixed" if len(labels) > 1 else "all_correct" if Label.CORRECT in labels else "all_incorrect"
        values = assigned(evidence or AnswerEvidence(), group)
        for place, (rollout, found) in enumerate(zip(group.trajectories, values, strict=True)):
            if rollout.label is None:
                continue
            worth = rollout.query_credit if evidence is None and rollout.query_credit is not None else found
            verdict = credit[index][place] if credit is not None else None
            ratios = _log_ratios(rollout, verdict or ())
            for value, ratio in zip(worth, ratios, strict=True):
                yield JudgedQuery(kind, rollout.label is Label.CORRECT, value > 0, ratio)


def _log_ratios(rollout: Trajectory, verdict: Sequence[TokenCredit]) -> list[float | None]:
    """Of each executed query: the mean of log teacher / student over its tokens."""
    means = {e.span: fmean(e.teacher_logprob) - fmean(e.student_logprob) for e in verdict}
    queries = [i for i, span in enumerate(rollout.spans) if span.kind is SpanKind.QUERY]
    return [means.get(i) for i in queries]


def ranked_pairs(queries: Sequence[JudgedQuery]) -> tuple[float, int]:
    """Of pairs of a good and another query: in how many the teacher prefers the good one (ties half), and how many.

    Their ratio is the area under the ROC curve.
    """
    good = torch.tensor([q.log_ratio for q in queries if q.is_good], dtype=torch.float64)
    other = torch.tensor([q.log_ratio for q in queries if not q.is_good], dtype=torch.float64)
    above, below = (good[:, None] > other).sum(), (good[:, None] < other).sum()
    pairs = len(good) * len(other)
    return float(above + pairs - below) / 2, pairs
