"""Whose weights read the hindsight block: the live policy's, or those of a copy that trails behind.

    kind                 weights                                              memory beside the policy
    LiveTeacher          the policy's at this moment (the paper)              none
    BatchStartTeacher    the policy's at the start of the rollout batch       one copy of the weights
    EMATeacher           exponential moving average of the policy's           one copy of the weights
    FrozenTeacher        the initial policy's                                 one copy of the weights

A copy has neither gradients nor optimizer state: 4 bytes per parameter in float32, so 12 GB for 3B parameters, on every
rank. It costs no time but that of its update; the teacher's forward pass is the same for all kinds.

Invariant: no gradient reaches a copy, and nothing but this file writes its weights.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy

import torch

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.types import Pluggable


class Teacher(Pluggable):
    """Base of teachers. Any class with these four methods is accepted in its place.

    The module calls them at fixed moments, whether the JSD weight is above 0 or not, so that an average misses no step.
    """

    required = ("attach", "begin_batch", "after_update", "policy")
    optional = ("in_checkpoint",)

    in_checkpoint: bool = True
    """Whether the copy belongs into a checkpoint; False where a resumed run makes the same copy again."""

    @abstractmethod
    def attach(self, policy: Policy) -> Policy | None:
        """Take the initial policy, once, before it is moved or wrapped.

        Returns:
            The copy, for the module to register (so that it is moved and saved with it); None without one.
        """

    def begin_batch(self, policy: Policy) -> None:
        """Before the first update on a batch of rollouts."""

    def after_update(self, policy: Policy) -> None:
        """After each optimizer step; not after one that was skipped."""

    @abstractmethod
    def policy(self, policy: Policy) -> Policy:
        """Who reads the block: the copy, or `policy` itself."""


class LiveTeacher(Teacher):
    """The policy itself, without gradient, at the weights of the moment: within a batch it moves with every update."""

    def attach(self, policy: Policy) -> None:
        """Take nothing: the policy itself will read the block."""

    def policy(self, policy: Policy) -> Policy:
        """The policy itself, at its present weights."""
        return policy


class CopiedTeacher(Teacher):
    """Base of teachers with weights of their own; `copy` is there once attached. It serves one module."""

    copy: Policy

    def attach(self, policy: Policy) -> Policy:
        """Take a frozen copy of the policy; weights that are tied stay tied."""
        self.copy = deepcopy(policy).requires_grad_(False)
        return self.copy

    def policy(self, policy: Policy) -> Policy:
        """The copy, at whatever weights it has by now."""
        return self.copy


class BatchStartTeacher(CopiedTeacher):
    """The weights that sampled the rollouts; with one update per batch it is `LiveTeacher` at the price of a copy."""

    in_checkpoint = False

    def begin_batch(self, policy: Policy) -> None:
        """Take over the policy's weights, which sampled the rollouts of this batch."""
        self.copy.load_state_dict(policy.state_dict())


class EMATeacher(CopiedTeacher):
    """Exponential moving average: after each optimizer step, teacher = (1 - rate) * teacher + rate * policy.

    Keep `model.dtype` float32: a bfloat16 weight cannot hold steps this small.

    Args:
        rate: the policy's share, strictly between 0 and 1; SDPO's 0.05 (arXiv:2601.20802) forgets half in 14 steps.
            A decay of 0.999, as others call it, is a rate of 0.001.
    """

    def __init__(self, rate: float = 0.05) -> None:
        if not 0 < rate < 1:
            raise ConfigError(
                f"EMATeacher: expected a rate strictly between 0 and 1, found {rate}. It is the policy's share at each "
                "update; 0 would be FrozenTeacher and 1 LiveTeacher."
            )
        self.rate = rate

    @torch.no_grad()
    def after_update(self, policy: Policy) -> None:
        """Move each weight by `rate` of its way to the policy's; buffers are taken over."""
        self.copy.reshard()
        # parameters() names a tied weight once, so it moves once; state_dict() would move it twice.
        for mine, current in zip(self.copy.parameters(), policy.parameters(), strict=True):
            mine.lerp_(current, self.rate)
        for buffer, current_buffer in zip(self.copy.buffers(), policy.buffers(), strict=True):
            buffer.copy_(current_buffer)


class FrozenTeacher(CopiedTeacher):
    """The initial weights, for good (OPSD's recommended setting, arXiv:2601.18734)."""

    in_checkpoint = False
