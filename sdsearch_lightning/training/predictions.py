"""Predictions: the rollouts of one batch of `trainer.predict`, in a form that one can read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sdsearch_lightning.types import RolloutGroup, SpanKind, Trajectory


class Predictions:
    """Rollouts in the order of their questions; printing them tells what was searched and answered.

    No `Sequence`: Lightning takes those apart to move what is in them, and a Trajectory is frozen.

    Args:
        groups: the greedy rollout of each question.
        sampled_groups: those drawn beside it, where `rollout.eval_samples` asks for any.
    """

    def __init__(self, groups: Sequence[RolloutGroup], sampled_groups: Sequence[RolloutGroup] | None = None) -> None:
        self.groups, self.sampled_groups = tuple(groups), tuple(sampled_groups or ())

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        """All rollouts, the greedy one of a question before those drawn for it."""
        drawn = self.sampled_groups or [None] * len(self.groups)
        pairs = zip(self.groups, drawn, strict=True)
        return tuple(t for pair in pairs for group in pair if group is not None for t in group.trajectories)

    @property
    def answers(self) -> tuple[str | None, ...]:
        """The answer of each rollout; None where it gave none."""
        return tuple(trajectory.answer for trajectory in self.trajectories)

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __repr__(self) -> str:
        return "\n".join(_told(trajectory) for trajectory in self.trajectories) or "no predictions"


def _told(trajectory: Trajectory) -> str:
    golds = " | ".join(trajectory.question.answers)
    lines = [f"question  {trajectory.question.text}" + (f"   (gold: {golds})" if golds else "")]
    lines += [f"  search  {' '.join(query.split())}" for query in trajectory.queries]
    if trajectory.answer is None:
        lines.append(f"  stopped {trajectory.stop_reason} after {_written(trajectory)} tokens, without an answer")
    else:
        lines.append(f"  answer  {trajectory.answer}")
    return "\n".join(lines)


def _written(trajectory: Trajectory) -> int:
    return sum(len(s.token_ids) for s in trajectory.spans if s.kind not in (SpanKind.PROMPT, SpanKind.OBSERVATION))
