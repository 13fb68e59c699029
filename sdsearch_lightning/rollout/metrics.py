"""What the rollouts of one training step tell: how they went, and what the window cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from sdsearch_lightning.rollout.progress import RolloutProgress
from sdsearch_lightning.rollout.search_pool import SearchCounts
from sdsearch_lightning.scoring.rewards import holds_gold
from sdsearch_lightning.scoring.scores import RolloutScores
from sdsearch_lightning.types import Label, RolloutGroup, SpanKind, Trajectory


def rollout_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """`rollout/*`: means over the rollouts of this rank, and shares of its groups."""
    rollouts = [trajectory for group in groups for trajectory in group.trajectories]
    scores = RolloutScores(sync_on_compute=False)  # on the CPU, where NCCL could not gather them
    scores.update(rollouts)
    metrics = {f"rollout/{name}": float(value) for name, value in scores.compute().items() if name != "questions"}
    labels = [[t.label for t in group.trajectories] for group in groups]
    searched = [t for t in rollouts if t.queries]
    metrics |= {
        f"rollout/{name}_tokens": fmean(_num_tokens(t, SpanKind(name)) for t in rollouts)
        for name in ("reasoning", "query", "refine", "answer", "observation")
    }
    return metrics | {
        "rollout/reward": fmean([t.reward for t in rollouts if t.reward is not None] or [0.0]),
        "rollout/tokens": fmean(len(t.token_ids) for t in rollouts),
        "rollout/policy_tokens": fmean(sum(t.policy_mask) for t in rollouts),
        "rollout/signal_groups": fmean(group.has_signal for group in groups),
        "rollout/mixed_groups": fmean(group.is_mixed for group in groups),
        "rollout/all_correct_groups": fmean(set(row) == {Label.CORRECT} for row in labels),
        "rollout/all_incorrect_groups": fmean(set(row) == {Label.INCORRECT} for row in labels),
        "rollout/gold_in_passages": _share(
            searched, lambda t: _holds_gold(t, [p.contents for r in t.passages for p in r])
        ),
        "rollout/gold_in_query": _share(searched, lambda t: _holds_gold(t, t.queries)),
        "rollout/gold_in_correct_query": _share(
            [t for t in searched if t.label is Label.CORRECT], lambda t: _holds_gold(t, t.queries)
        ),
        "rollout/cut_passages": sum(t.num_cut_passages for t in rollouts)
        / max(sum(len(found) for t in rollouts for found in t.passages), 1),
        "rollout/tagged_query_rate": sum(t.num_tagged_queries for t in rollouts)
        / max(sum(t.num_tagged_queries + len(t.queries) for t in rollouts), 1),
    }


def _num_tokens(trajectory: Trajectory, kind: SpanKind) -> int:
    return sum(len(span.token_ids) for span in trajectory.spans if span.kind is kind)


def _holds_gold(trajectory: Trajectory, texts: Iterable[str]) -> bool:
    return holds_gold(trajectory.question.answers, texts)


def _share(rollouts: Sequence[Trajectory], is_counted: Callable[[Trajectory], bool]) -> float:
    """Share of `rollouts` that are counted; 0 where there is none."""
    return sum(map(is_counted, rollouts)) / max(len(rollouts), 1)


def window_metrics(progress: RolloutProgress, counts: SearchCounts) -> dict[str, float]:
    """What a rank's window cost, a mean over ranks: `rollout/seconds` and `search/seconds`."""
    return {"rollout/seconds": progress.seconds, "search/seconds": counts.seconds}


def window_totals(progress: RolloutProgress, counts: SearchCounts) -> dict[str, float]:
    """What a rank's window did, a sum over ranks: speed and `search/*`."""
    return {
        "rollout/tokens_per_second": progress.tokens_per_second,
        "search/queries": float(counts.queries),
        "search/unique": float(counts.unique),
        "search/errors": float(counts.errors),
    }
