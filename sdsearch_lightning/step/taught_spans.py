"""Who is taught where: which block stands before a rollout, and at which of its spans the readings are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sdsearch_lightning.types import HindsightBlock, SpanKind, Trajectory

Positions = Literal["queries", "policy"]
"""JSD positions: tokens strictly inside executed queries (the paper), or all that the policy sampled (its ablation)."""


@dataclass(frozen=True, slots=True)
class TaughtSpans:
    """One sequence that the teacher reads, and where it is compared with the student's.

    Example:
        A rollout of spans 0 PROMPT, 1 SCAFFOLD, 2 QUERY, 3 SCAFFOLD, 4 OBSERVATION, 5 SCAFFOLD, 6 QUERY, ... that reads
        one block for both of its queries is `TaughtSpans(rollout=0, block_text="...", spans=(2, 6))`.
    """

    rollout: int
    """Index into the rollouts of the micro-batch."""
    block_text: str
    spans: tuple[int, ...]
    """Indices into `Trajectory.spans`: the tokens at which student and teacher are compared."""
    contrast_text: str | None = None
    """What the teacher reads the same sequence with once more, see `TeacherView.contrast`."""


def distilled_spans(trajectory: Trajectory, positions: Positions) -> tuple[int, ...]:
    """Indices of the spans whose tokens are JSD positions; closing tags of queries never are with `queries`."""
    return tuple(
        index
        for index, span in enumerate(trajectory.spans)
        if span.sampled and (positions == "policy" or span.kind is SpanKind.QUERY)
    )


def num_distilled_tokens(trajectory: Trajectory, positions: Positions) -> int:
    """Number of JSD positions of a rollout: |Q| of the paper, or all sampled tokens with `policy`."""
    return sum(len(trajectory.spans[index].token_ids) for index in distilled_spans(trajectory, positions))


def find_taught_spans(
    rollouts: Sequence[tuple[Trajectory, HindsightBlock | None]], positions: Positions
) -> tuple[TaughtSpans, ...]:
    """The lessons of a micro-batch, in the order of its rollouts; a rollout whose group is not taught has none.

    A view of one query judges that query's span alone. A taught rollout without a query still gets its lesson, an
    empty one: student and teacher then run in equal shapes, and an empty block gives a divergence of exactly 0.
    """
    lessons = []
    for number, (trajectory, block) in enumerate(rollouts):
        spans = distilled_spans(trajectory, positions)
        for view in block.views_of(trajectory.rollout_index) if block is not None else ():
            judged = spans if view.query_index is None else spans[view.query_index : view.query_index + 1]
            lessons.append(TaughtSpans(number, view.text, judged, view.contrast))
    return tuple(lessons)
