"""Tokens that steer a rollout: what the divergence leaves out of its support, and whose probability is watched.

Inside a query neither side may write a tag. The teacher's stray probability of one is noise, but a student that is
pulled towards it makes the teacher expect more of it, since both share their weights: runs collapsed that way, with
valid actions from .97 to .29 in six steps. So by default both sides are compared given that no tag comes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ControlTokens(NamedTuple):
    """Ids of the tokens that steer a rollout."""

    environment: Tensor
    """[E] tags that only the environment writes; empty where each is several tokens."""
    policy: Tensor
    """[P] tokens that begin a tag, that end a turn, or are special, without those of the environment; empty where the
    policy is meant to write them."""
    is_excluded: bool
    """Whether the divergence leaves all of them out, with both sides renormalised."""

    @property
    def measured(self) -> list[str]:
        """Whose probability says something: of those that are there."""
        return [name for name, ids in (("environment", self.environment), ("policy_tag", self.policy)) if len(ids)]

    def masses(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[Q] probability of the environment's tokens and of the policy's, from [Q, V]."""
        return probs[:, self.environment].sum(-1), probs[:, self.policy].sum(-1)

    def top(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[Q, k] largest logits [Q, V] and their ids, of the tokens that are compared; fewer where k is all of them."""
        if not self.is_excluded:
            return logits.topk(k, dim=-1)  # type: ignore[return-value]
        ids = torch.cat([self.environment, self.policy])
        values, found = logits.index_fill(-1, ids, -torch.inf).topk(min(k, logits.shape[-1] - len(ids)), dim=-1)
        return values, found

    def compared(self, logits: Tensor) -> Tensor:
        """[Q, K] the columns of logits [Q, V] that are compared."""
        if not self.is_excluded:
            return logits
        is_kept = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_kept[self.environment] = is_kept[self.policy] = False
        return logits[:, is_kept]
