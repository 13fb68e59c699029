"""The trainer's own log-probs before the first update: what later updates of the same rollouts are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdsearch_lightning.losses.logprobs import at_tokens, log_softmax
from sdsearch_lightning.policy.head import Chunk, Outcome, Reading
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.step.collate import SearchBatch, WeightedRollout
from sdsearch_lightning.types import InstanceId

OldLogprobs = Mapping[tuple[InstanceId, int], Tensor]
"""[T] by (instance_id, rollout_index); 0 where the policy did not sample the token."""


@torch.no_grad()
def read_logprobs(
    policy: Policy, batch: SearchBatch, rollouts: Sequence[WeightedRollout], temperature: float
) -> OldLogprobs:
    """Log-probs of the sampled tokens of a micro-batch, in a pass of its own.

    Args:
        policy: at the weights of the moment.
        batch: the micro-batch.
        rollouts: what it was made of; none for a filler, whose pass is made all the same.
        temperature: of the rollouts.
    """
    rows = batch.policy_weight.nonzero()[:, 0]
    tokens = batch.token_ids[rows]

    def read(chunk: Chunk) -> tuple[Tensor, Tensor]:
        return chunk.logits.new_zeros(0), at_tokens(log_softmax(chunk.logits, temperature), tokens[chunk.rows])

    outcome: Outcome = policy(batch.sequences, [Reading(rows, read)])
    known = torch.zeros_like(batch.sampled_logprobs)
    known[rows] = torch.cat(outcome.kept[0]).to(known.dtype)
    trajectories = [rollout.trajectory for rollout in rollouts]
    parts = known.cpu().split([len(t.token_ids) for t in trajectories]) if trajectories else ()
    return {(t.instance_id, t.rollout_index): part for t, part in zip(trajectories, parts, strict=True)}


def with_old_logprobs(groups: Sequence[Sequence[WeightedRollout]], known: OldLogprobs) -> list[list[WeightedRollout]]:
    """The same rollouts, each with its own."""
    return [
        [replace(r, old_logprobs=known[r.trajectory.instance_id, r.trajectory.rollout_index]) for r in group]
        for group in groups
    ]
