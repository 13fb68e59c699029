"""What the rollouts of one training step tell: how they went, and what the window cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from sdsearch_lightning.evaluation import RolloutScores
from sdsearch_lightning.rollout.progress import RolloutProgress
from sdsearch_lightning.rollout.search_pool import SearchCounts
from sdsearch_lightning.types import Label, RolloutGroup


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`rollout/*`: means over the rollouts of this rank, and shares of its groups."""
    rollouts = [trajectory for group in groups for trajectory in group.trajectories]
    scores = RolloutScores()
    scores.update(rollouts)
    metrics = {f"rollout/{name}": float(value) for name, value in scores.compute().items() if name != "questions"}
    labels = [[t.label for t in group.trajectories] for group in groups]
    return metrics | {
        "rollout/reward": fmean(t.reward or 0.0 for t in rollouts),
        "rollout/tokens": fmean(len(t.token_ids) for t in rollouts),
        "rollout/policy_tokens": fmean(sum(t.policy_mask) for t in rollouts),
        "rollout/signal_groups": fmean(group.has_signal for group in groups),
        "rollout/mixed_groups": fmean(group.is_mixed for group in groups),
        "rollout/all_correct_groups": fmean(set(row) == {Label.CORRECT} for row in labels),
        "rollout/all_incorrect_groups": fmean(set(row) == {Label.INCORRECT} for row in labels),
    }


def window_metrics(progress: RolloutProgress, counts: SearchCounts) -> dict[str, float]:
    """`rollout/seconds` and speed, `search/*`."""
    return {
        "rollout/seconds": progress.seconds,
        "rollout/tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "search/queries": float(counts.queries),
        "search/unique": float(counts.unique),
        "search/errors": float(counts.errors),
        "search/seconds": counts.seconds,
    }
