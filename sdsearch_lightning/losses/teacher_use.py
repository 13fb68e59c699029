"""What the teacher's verdict on a sampled token is used for: its advantage, its share of the divergence, or both.

    use            advantage of the clipped surrogate                    weight of the divergence
    Distillation   A                                                     1
    RLSD           A, times a bounded magnitude by the teacher           0
    SDAR           A                                                     a gate in (0, 1)
    CAST           A where the verdict agrees, turned where it does not  0 unless asked for
    RLCSD          A, plus a bounded bonus that cannot turn its sign     0

The verdict on a token is log T / S: the teacher's log-prob of it minus the student's, both at temperature 1; or minus
the teacher's own behind a second block, where `hindsight.block` writes one (`ContrastedSiblings`). Invariants: what is
made of a token depends on that token alone, so that micro-batches, order and ranks change nothing, and no gradient
flows through it. A group that is not taught keeps its advantages.

A use of your own is any class with `weigh`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TypeVar

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Pluggable

Found = TypeVar("Found")


class TeacherUse(Pluggable):
    """Base of what a teacher's verdict is used for. Any class with a `weigh` method is accepted in its place."""

    required = ("weigh",)

    @abstractmethod
    def weigh(self, log_ratio: Tensor, advantages: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What the losses use at C taught tokens; called without gradient.

        Args:
            log_ratio: [C] nats, log T / S of the sampled token: above 0 where the block speaks for it.
            advantages: [C] of the tokens.
            labels: [C] outcome of the token's rollout: 1 CORRECT, -1 INCORRECT, 0 unknown.

        Returns:
            [C] advantages for the clipped surrogate, and [C] weights of at least 0 for the divergence.
        """

    @classmethod
    def adopt(cls, found: Found) -> Found:
        """`found`, after a probe call.

        Raises:
            ConfigError: it does not give two tensors of the right shape, finite, the weights not below 0.
        """
        log_ratio, advantages, labels = torch.tensor([[-1.0, 1.0, 0.0], [2.0, -2.0, 0.0], [1.0, -1.0, -1.0]])
        given = super().adopt(found).weigh(log_ratio, advantages, labels)  # type: ignore[attr-defined]
        parts = given if isinstance(given, tuple) else (given,)
        fits = all(isinstance(part, Tensor) and part.shape == labels.shape and part.isfinite().all() for part in parts)
        if len(parts) != 2 or not fits or (parts[1] < 0).any():
            raise ConfigError(
                f"model.teacher_use: expected {type(found).__name__}.weigh to give two tensors [C], finite "
                f"advantages and weights of at least 0, found {given!r} for C = 3. See losses.TeacherUse.weigh."
            )
        return found


class Distillation(TeacherUse):
    """The paper's (arXiv:2605.18299): the divergence counts alike at all taught tokens, advantages stay as they are."""

    def weigh(self, log_ratio: Tensor, advantages: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A and 1, exactly."""
        return advantages, torch.ones_like(log_ratio)


class RLSD(TeacherUse):
    """The reward gives the sign and the teacher the magnitude; no divergence (arXiv:2604.03128, eq. 13 to 15).

        A_t = A * ((1 - mix) + mix * clip((T / S) ** sign(A), 1 - clip, 1 + clip))

    The paper fades `mix` out over the run; here it stays as it is, and only ends with `jsd.schedule`. Both defaults are
    ours: they are where a public reproduction begins, the paper's own values were not at hand.

    Args:
        mix: the teacher's share in the magnitude, in [0, 1]; 0 is GRPO.
        clip: how far the teacher's factor may be from 1, in [0, 1]; below 1 no advantage loses its sign.
    """

    def __init__(self, mix: float = 0.5, clip: float = 0.2) -> None:
        _check("RLSD.mix", mix, 1)
        _check("RLSD.clip", clip, 1)
        self.mix, self.clip = mix, clip

    def weigh(self, log_ratio: Tensor, advantages: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The equation above, and 0."""
        magnitude = (advantages.sign() * log_ratio).exp().clamp(1 - self.clip, 1 + self.clip)
        return advantages * ((1 - self.mix) + self.mix * magnitude), torch.zeros_like(log_ratio)


class SDAR(TeacherUse):
    """A gate on the divergence: open where the teacher endorses the sampled token (arXiv:2605.15155).

        gate = sigmoid(slope * log T / S)

    The paper's slope is 5, beside a reverse KL of weight .01.

    Args:
        slope: how sharply the gate opens, at least 0; 0 is half of the divergence everywhere.
    """

    def __init__(self, slope: float = 5.0) -> None:
        _check("SDAR.slope", slope)
        self.slope = slope

    def weigh(self, log_ratio: Tensor, advantages: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A, and the gate."""
        return advantages, (self.slope * log_ratio).sigmoid()


class CAST(TeacherUse):
    """The teacher acts by the sign of its verdict alone, in groups without contrast too, after arXiv:2606.00172.

        a   = A,             or base * label where A is 0
        A_t = a              where log T / S has the sign of a
              -flip * a      where it has the other one
              A              where either is 0

    Known of the paper (its abstract): token advantages may turn their sign, bounded, where a stop-gradient self-teacher
    and the outcome disagree, and groups without contrast get a bounded base advantage of the outcome's sign. Ours: that
    base and flip are constants (the paper shapes by the size of the gap), their values, that a verdict of 0 changes
    nothing, the option of a divergence, and the teacher (the paper's reads no privileged text). With `flip` 0, the
    default, a token on which the two disagree is left out.

    Args:
        base: size of the advantage in groups where it is 0, at least 0; 0 leaves them alone.
        flip: share of the advantage that turns against its sign where the verdict disagrees, at least 0.
        divergence: weight of the divergence at tokens where both agree, at least 0; 0 leaves it out.
    """

    def __init__(self, base: float = 0.1, flip: float = 0.0, divergence: float = 0.0) -> None:
        _check("CAST.base", base)
        _check("CAST.flip", flip)
        _check("CAST.divergence", divergence)
        self.base, self.flip, self.divergence = base, flip, divergence

    def weigh(self, log_ratio: Tensor, advantages: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The equation above, and `divergence` where both agree."""
        wanted = torch.where(advantages == 0, self.base * labels, advantages)
        agreement = log_ratio.sign() * wanted.sign()
        shaped = torch.where(agreement < 0, -self.flip * wanted, torch.where(agreement > 0, wanted, advantages))
        return shaped, self.divergence * (agreement > 0).to(log_ratio.dtype)


class RLCSD(TeacherUse):
    """A bounded bonus that cannot turn the sign of an advantage; for two blocks (arXiv:2606.11709, eq. 7 to 11).

        r   = scale * tanh(e / temperature),  e = log T(right hint) / T(wrong hint);  0 where |r| <= threshold
        A_t = A + r, or 0 where that has not the sign of A;  0 where A is 0

    e is the contrast of two readings with the block `ContrastedSiblings`; with one block, log T / S. Not the paper's:
    one wrong text instead of a mean over wrong hints, one mean over all tokens (it averages tokens with and without
    a bonus apart).

    Args:
        scale: the largest bonus, at least 0; .5 is the paper's.
        temperature: the contrast at which the bonus is .76 of it, above 0. Published settings differ: .02 and 1.3.
        threshold: smaller bonuses are left out, at least 0; .02 is the paper's.
    """

    def __init__(self, scale: float = 0.5, temperature: float = 1.3, threshold: float = 0.02) -> None:
        _check("RLCSD.scale", scale)
        _check("RLCSD.threshold", threshold)
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"RLCSD.temperature: expected a finite number above 0, found {temperature}.")
        self.scale, self.temperature, self.threshold = scale, temperature, threshold

    def weigh(self, log_ratio: Tensor, advantages: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The equations above, and 0."""
        bonus = self.scale * (log_ratio / self.temperature).tanh()
        shaped = advantages + bonus.where(bonus.abs() > self.threshold, 0)
        return shaped * (shaped.sign() == advantages.sign()), torch.zeros_like(log_ratio)


def _check(name: str, value: float, largest: float = math.inf) -> None:
    if not (math.isfinite(value) and 0 <= value <= largest):
        wanted = "a finite number of at least 0" if largest == math.inf else f"a number in [0, {largest:g}]"
        raise ConfigError(f"model.teacher_use: expected {name} to be {wanted}, found {value}.")
