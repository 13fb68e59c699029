"""Disk that a run takes at most: the checkpoints that stay, and every rollout as a line of text.

Checkpoints are counted: trained weights and what the optimizer keeps of them. Rollouts are assumed to be as long as
they may be, and to take what stands in the constants below; `benchmarks/disk_growth.py` measures both of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from sdsearch_lightning.plan.memory import Settings

ROLLOUT_BYTES = 30.0
"""Assumed: of a token in trajectories.jsonl. Its id, text and log-prob; passages once more; five tokens of the teacher
for each token of a query. 18 were measured with ids of three digits, real vocabularies have five or six."""
PACKED = 0.4
"""Assumed: share that is left of it in a closed segment."""


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes on disk, of all processes together."""

    checkpoint: float
    """Of one checkpoint."""
    num_checkpoints: int
    """At a time: those that stay, and the one that is being written."""
    step: float
    """Rollouts of a training step, before they are packed."""
    num_steps: int | None
    """None: the run has no last step."""

    @property
    def checkpoints(self) -> float:
        """Of all checkpoints at a time."""
        return self.checkpoint * self.num_checkpoints

    @property
    def rollouts(self) -> float | None:
        """Of all training rollouts, packed; None where the run has no last step."""
        return None if self.num_steps is None else self.step * self.num_steps * PACKED


def disk_of(
    settings: Settings, num_rollouts: int, max_tokens: int, num_steps: int | None, keep: int, keep_every: int | None
) -> Disk:
    """What a run writes.

    Args:
        settings: of the plan.
        num_rollouts: of one training step, of all processes.
        max_tokens: of one rollout.
        num_steps: of the run; None where it has no last one.
        keep: `run.checkpoint_keep`.
        keep_every: `run.checkpoint_keep_every`.
    """
    forever = (num_steps or 0) // keep_every if keep_every else 0
    checkpoint = settings.model.trained_bytes * (1 + settings.optimizer.state)
    return Disk(checkpoint, keep + 1 + forever, num_rollouts * max_tokens * ROLLOUT_BYTES, num_steps)
