"""Group-relative advantages (GRPO): a rollout is worth what it earns above its siblings.

Invariant: a group without contrast (all rewards equal, or a single rollout) gives exactly 0 in every dtype: no rounding
residue divided by eps, and not the raw reward that a singleton gets elsewhere.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError

AdvantageScale = Literal["std", "none"]


def group_relative(rewards: Tensor, scale: AdvantageScale = "std", eps: float = 1e-6) -> Tensor:
    """Advantage of each rollout within its group.

        (r - mean_group(r)) / (std_group(r) + eps)                                          (arXiv:2402.03300)

    std is the sample standard deviation (ddof 1) over the G rollouts.

    Args:
        rewards: [B, G], one row per group.
        scale: "std" divides by the group's standard deviation; "none" keeps reward units (Dr. GRPO, arXiv:2503.20783).
        eps: added to the standard deviation.

    Returns:
        [B, G] in the dtype of `rewards`; each row sums to 0.

    Raises:
        ConfigError: unknown `scale`.
    """
    if scale not in get_args(AdvantageScale):
        raise ConfigError(f"Unknown advantage scale {scale!r}: expected one of {', '.join(get_args(AdvantageScale))}.")
    centered = rewards - rewards.mean(dim=1, keepdim=True)  # [B, G]
    if scale == "std":
        variance = centered.square().sum(dim=1, keepdim=True) / max(rewards.shape[1] - 1, 1)
        centered = centered / (variance.sqrt() + eps)
    # The mean of G equal floats can be one ulp off, and 1e-17 / eps is not 0.
    constant = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(constant, torch.zeros_like(centered), centered)
