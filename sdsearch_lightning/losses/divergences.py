"""Divergences of the student from the teacher at query tokens: first a support (which tokens), then a formula.

A `Support` turns two rows over the vocabulary into two rows over few tokens; the formula sees nothing else, so every
formula goes with every support. Invariant: equal rows give exactly 0, and no gradient reaches the teacher.

A formula of your own is a `SupportedDivergence` with `formula`, or any class with `divergence`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.logprobs import floored_log_softmax, wide_dtype
from sdsearch_lightning.losses.terms import check_beta, check_top_k, jensen_shannon
from sdsearch_lightning.types import Pluggable

SupportName = Literal["teacher", "student", "union"]
TailName = Literal["renormalize", "bucket"]
DEFAULT_TOP_K = 50
"""The paper's."""


@dataclass(frozen=True, slots=True)
class Support:
    """The tokens that count at a position, and what becomes of the probability outside of them.

        teacher       the teacher's top k: what the block makes likely
        student       the student's top k: what the policy would write (SDPO, arXiv:2601.20802: k = 100 and a bucket)
        union         both: k to 2k tokens
        renormalize   the tail is dropped, and both sides are distributions given that the token is in the support
        bucket        the tail is one more token, with all the remaining mass: what leaves the support counts

    Raises:
        ConfigError: `top_k` below 1, an unknown name, or an option that says nothing about a full vocabulary.
    """

    top_k: int | None = DEFAULT_TOP_K
    """None = the full vocabulary."""
    tokens: SupportName = "teacher"
    tail: TailName = "renormalize"

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        for name, value, known in (("support", self.tokens, SupportName), ("tail", self.tail, TailName)):
            if value not in get_args(known):
                raise ConfigError(f"Unknown {name} {value!r}: expected one of {', '.join(get_args(known))}.")
            if self.top_k is None and value != get_args(known)[0]:
                raise ConfigError(
                    f"{name} {value!r} has no meaning with top_k null: the full vocabulary is everybody's top, and has "
                    f"no tail. Set top_k, or leave {name} at {get_args(known)[0]!r}."
                )

    def narrow(self, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides on the support.

        Args:
            student_logits: [Q, V].
            teacher_logits: [Q, V] at the same positions; no gradient flows here.

        Returns:
            [Q, K] logits of both, K = k (teacher, student) or 2k (union), one more with a bucket; they need a softmax.
            A place that a row does not use, as a token that both have in their top k, is -inf on both sides. With a
            full vocabulary, or k of its size or above, the rows as they are.
        """
        teacher_logits = teacher_logits.detach()
        if self.top_k is None or self.top_k >= teacher_logits.shape[-1]:
            return student_logits, teacher_logits
        sides = {"teacher": [teacher_logits], "student": [student_logits], "union": [student_logits, teacher_logits]}
        token_ids = torch.cat([side.topk(self.top_k, dim=-1).indices for side in sides[self.tokens]], dim=-1)
        if self.tokens == "union":
            token_ids = token_ids.sort(dim=-1).values
        repeated = pad(token_ids.diff(dim=-1) == 0, (1, 0))  # [Q, K]; in a union only, where equal ids are neighbours
        return self._gather(student_logits, token_ids, repeated), self._gather(teacher_logits, token_ids, repeated)

    def _gather(self, logits: Tensor, token_ids: Tensor, repeated: Tensor) -> Tensor:
        if self.tail == "renormalize":
            return logits.gather(-1, token_ids).masked_fill(repeated, -math.inf)
        logprobs = floored_log_softmax(logits)
        # Summed over what is outside, not 1 - what is inside: a tail of 1e-12 keeps its digits and its gradient.
        outside = logprobs.scatter(-1, token_ids, -math.inf)
        inside = logprobs.gather(-1, token_ids).masked_fill(repeated, -math.inf)
        return torch.cat([inside, outside.logsumexp(-1, keepdim=True)], dim=-1)


class Divergence(Pluggable):
    """Base of token-level distillation losses. Any class with a `divergence` method is accepted in its place."""

    required, optional = ("divergence",), ("teacher_top_k", "check")

    teacher_top_k: int | None = None
    """The teacher's k most probable tokens, both sides renormalised, are all that `divergence` looks at: no more of the
    teacher is kept, and both rows come as [Q, k], on those tokens. None = rows over the whole vocabulary."""

    @abstractmethod
    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] loss per query token from student_logits [Q, V] and teacher_logits [Q, V] (detached)."""

    def check(self, vocabulary_size: int) -> None:
        """Called once, when the model is known.

        Raises:
            ConfigError: the options do not fit a vocabulary of this size.
        """


class SupportedDivergence(Divergence):
    """A formula on a support; see `Support` for what the options mean.

    Args:
        top_k: size of the support; null for the full vocabulary. A value of your own has to fit the vocabulary; the
            default means at most 50, so that a small vocabulary is taken whole.
        support: whose top_k tokens are compared: teacher, student, or union of both.
        tail: what becomes of the other tokens: renormalize leaves them out, bucket adds them up as one token.
    """

    def __init__(
        self,
        top_k: int | None = DEFAULT_TOP_K,
        support: SupportName = "teacher",
        tail: TailName = "renormalize",
    ) -> None:
        self.support = Support(top_k, support, tail)
        if (support, tail) == ("teacher", "renormalize"):
            self.teacher_top_k = top_k

    @abstractmethod
    def formula(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] from two rows [Q, K] on one support; a place of -inf on both sides is not there."""

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] the formula on the support, in the student's dtype."""
        return self.formula(*self.support.narrow(student_logits, teacher_logits)).to(student_logits.dtype)

    def check(self, vocabulary_size: int) -> None:
        """Refuse a top_k that the vocabulary cannot give, see `Divergence.check`."""
        top_k = self.support.top_k
        if top_k is not None and top_k > vocabulary_size and top_k != DEFAULT_TOP_K:
            raise ConfigError(
                f"divergence.top_k: expected 1 to {vocabulary_size} (the size of the model's vocabulary), or null for "
                f"all of it, found {top_k}."
            )


class JensenShannon(SupportedDivergence):
    """The paper's: generalised Jensen-Shannon divergence, symmetric and at most ln 2 at beta 0.5.

    Args:
        beta: teacher's share of the mixture, in [0, 1]: 0.5 is symmetric, 0 means KL(teacher || student),
            1 means KL(student || teacher).
    """

    def __init__(
        self,
        beta: float = 0.5,
        top_k: int | None = DEFAULT_TOP_K,
        support: SupportName = "teacher",
        tail: TailName = "renormalize",
    ) -> None:
        check_beta(beta)
        super().__init__(top_k, support, tail)
        self.beta = beta

    def formula(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] nats, in [0, ln 2] at beta 0.5; see `losses.jensen_shannon`."""
        return jensen_shannon(student_logits, teacher_logits, self.beta)


class ForwardKL(SupportedDivergence):
    """KL(teacher || student): the student has to cover all that the teacher would write. `JensenShannon(beta=0)`."""

    def formula(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] nats of KL(teacher || student); not bounded."""
        return jensen_shannon(student_logits, teacher_logits, beta=0)


class ReverseKL(SupportedDivergence):
    """KL(student || teacher): the student gives up what the teacher would not write. `JensenShannon(beta=1)`."""

    def formula(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] nats of KL(student || teacher); not bounded."""
        return jensen_shannon(student_logits, teacher_logits, beta=1)


class LogitMSE(SupportedDivergence):
    """Mean squared difference of logits over the support; no tail, since a bucket has a probability but no logit.

    A constant added to a row changes its logits and none of its probabilities. Plain MSE asks the student to copy the
    teacher's constant too; the paper's row "MSE on logits" is read so, as the reason it gives ("ignores the simplex")
    describes just this. Centred, each row's mean over the support is subtracted first and the constant does not count:
    the limit of KL at high temperature (arXiv:1503.02531, eq. 4). A token of -inf on either side has no logit to match
    and is left out.

    Args:
        centered: subtract each row's mean first.
    """

    def __init__(
        self, top_k: int | None = DEFAULT_TOP_K, support: SupportName = "teacher", centered: bool = False
    ) -> None:
        super().__init__(top_k, support)
        self.centered = centered

    def formula(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """[Q] mean squared difference of logits over the support; not bounded."""
        wide = wide_dtype(student_logits.dtype)
        absent = student_logits.isneginf() | teacher_logits.isneginf()
        num_tokens = absent.logical_not().sum(-1, keepdim=True).clamp(min=1)
        gap = (student_logits.to(wide) - teacher_logits.to(wide)).masked_fill(absent, 0)  # [Q, K]
        if self.centered:
            gap = (gap - gap.sum(-1, keepdim=True) / num_tokens).masked_fill(absent, 0)
        return (gap.square() / num_tokens).sum(-1)
