"""What is kept of the teacher: at the query tokens only, and never its whole distribution.

With a top-k divergence the k logits of its support stay; with the full vocabulary its hidden rows do, and the head is
run on them again beside the student's. Everything here is without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdsearch_lightning.losses.divergences import Divergence
from sdsearch_lightning.losses.logprobs import at_tokens, entropy, log_softmax
from sdsearch_lightning.losses.teacher_use import TeacherUse
from sdsearch_lightning.step.control_tokens import ControlTokens

Rows = TypeVar("Rows", bound=Any)
"""A dataclass of columns with one first dimension; a column may be None, in all parts alike."""
NUM_TOP = 5
"""Tokens of the teacher that are kept for the report."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """What is kept of the teacher at Q query tokens; without gradient."""

    support: Tensor | None
    """[Q, k] token ids of its top k; None for the full vocabulary."""
    logits: Tensor | None
    """[Q, k] its logits there."""
    hidden: Tensor | None
    """[Q, H] rows before the head; None with a top-k support."""
    entropy: Tensor
    """[Q] nats."""
    logprob: Tensor
    """[Q] of the token that was sampled."""
    environment_mass: Tensor
    """[Q] probability of tokens that only the environment may write."""
    policy_tag_mass: Tensor
    """[Q] probability of the other tokens that steer a rollout."""
    top_ids: Tensor
    """[Q, NUM_TOP]."""
    top_probs: Tensor
    """[Q, NUM_TOP]."""
    contrast: Tensor | None = None
    """[Q] log-prob of the sampled token behind the view's second text; None where views have none."""

    def at(self, rows: slice) -> TeacherRows:
        """The teacher at some of the rows."""
        return select(self, rows)


class Verdict(NamedTuple):
    """The teacher on C sampled tokens, and what its use makes of them; without gradient, see `losses.TeacherUse`."""

    log_ratio: Tensor
    """[C] nats."""
    advantages: Tensor
    """[C] for the clipped surrogate."""
    gate: Tensor
    """[C] weight of the divergence, beside the token's own."""
    is_changed: Tensor
    """[C] bool, whether the advantage is another than the batch's."""


def judge_tokens(
    use: TeacherUse, student_logprob: Tensor, teacher: TeacherRows, advantages: Tensor, labels: Tensor
) -> Verdict:
    """What the teacher says of C sampled tokens, and what `use` makes of it.

    Args:
        use: of the verdict.
        student_logprob: [C] of the tokens, at temperature 1.
        teacher: its rows.
        advantages: [C].
        labels: [C] see `SearchBatch.query_label`.
    """
    log_ratio = teacher.logprob - (student_logprob if teacher.contrast is None else teacher.contrast)
    shaped, gate = use.weigh(log_ratio, advantages, labels)
    return Verdict(log_ratio, shaped, gate, shaped != advantages)


def summarize_teacher(
    logits: Tensor, hidden: Tensor, tokens: Tensor, top_k: int | None, controls: ControlTokens
) -> TeacherRows:
    """Reduce the teacher's logits [Q, V] to what the loss and the report need.

    Args:
        logits: [Q, V].
        hidden: [Q, H] the rows they came from.
        tokens: [Q] the sampled tokens.
        top_k: support of the divergence; None, or one beyond V, = full vocabulary.
        controls: tokens that steer a rollout.
    """
    logprobs = log_softmax(logits)
    probs = logprobs.exp()
    top = probs.topk(min(NUM_TOP, logits.shape[-1]), dim=-1)
    limited = top_k is not None and top_k < logits.shape[-1]
    kept, support = controls.top(logits, top_k) if limited else (None, None)  # type: ignore[arg-type]
    environment_mass, policy_tag_mass = controls.masses(probs)
    return TeacherRows(
        support=support,
        logits=kept,
        hidden=None if limited else hidden,
        entropy=entropy(logprobs),
        logprob=at_tokens(logprobs, tokens),
        environment_mass=environment_mass,
        policy_tag_mass=policy_tag_mass,
        top_ids=top.indices,
        top_probs=top.values,
    )


def with_contrast(rows: TeacherRows, num_rows: int) -> TeacherRows:
    """The first `num_rows` rows; where there are as many again, they are the contrast, and stay as its log-probs."""
    if len(rows.logprob) == num_rows:
        return rows
    return replace(select(rows, slice(num_rows)), contrast=rows.logprob[num_rows:])


def divergence_to_teacher(
    divergence: Divergence,
    student_logits: Tensor,
    teacher: TeacherRows,
    teacher_logits: Tensor | None,
    controls: ControlTokens,
) -> Tensor:
    """[Q] divergence of the student from the teacher, on the teacher's support, both renormalised there.

    Args:
        divergence: the loss.
        student_logits: [Q, V], with gradient.
        teacher: its rows.
        teacher_logits: [Q, V] from `teacher.hidden`; None with a top-k support.
        controls: tokens that steer a rollout; of a top-k support they are left out already.
    """
    if teacher.support is not None:
        assert teacher.logits is not None
        return divergence.divergence(student_logits.gather(1, teacher.support), teacher.logits)
    assert teacher_logits is not None
    return divergence.divergence(controls.compared(student_logits), controls.compared(teacher_logits.detach()))


def join(parts: Sequence[Rows]) -> Rows:
    """All rows of all parts, in order; at least one part."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(parts[0])}
    joined = {name: None if column[0] is None else torch.cat(column) for name, column in columns.items()}
    return replace(parts[0], **joined)


def select(rows: Rows, where: slice) -> Rows:
    """The rows `where`, of every column."""
    columns = {field.name: getattr(rows, field.name) for field in fields(rows)}
    return replace(rows, **{name: None if column is None else column[where] for name, column in columns.items()})
