"""Losses on the logits of an output layer, by the library and by others: what bench_loss_head.py compares.

Each takes the same hidden rows and gives one number to differentiate.

Next: bench_loss_head.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sdsearch_lightning.losses.divergences import Divergence, JensenShannon
from sdsearch_lightning.losses.teacher_use import Distillation
from sdsearch_lightning.losses.terms import total_loss
from sdsearch_lightning.losses.weights import EntropyCoefs
from sdsearch_lightning.policy.head import Chunk, Head, Outcome, Reading, read_rows
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.step.collate import SearchBatch
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.policy_terms import PolicyTerms
from sdsearch_lightning.step.student import Student
from sdsearch_lightning.step.teacher_rows import TeacherRows, divergence_to_teacher, join, summarize_teacher

VOCABULARY, TOKENS, POLICY_ROWS, QUERY_ROWS = 151_936, 512, 256, 64
TRL_CHUNK = 32_768  # entries of the vocabulary, as in TRL's divergence
POLICY_TERMS = PolicyTerms(0.2, 0.2, 1.0, 0.0, EntropyCoefs(), None, 1.0)
EXACT, TOP_50 = JensenShannon(top_k=None), JensenShannon()
NAIVE, TRL, LIGER = "naive", "TRL", "Liger"
OURS, PLAIN, TOP = "ours", "ours, plain autograd", "ours, top 50"


@dataclass(frozen=True)
class Inputs:
    """Hidden rows of T tokens, an output layer, and one micro-batch that says what its rows are."""

    student: Tensor
    """[T, H], a leaf."""
    teacher: Tensor
    """[T, H]."""
    weight: nn.Parameter
    """[V, H]."""
    batch: SearchBatch

    @classmethod
    def make(cls, hidden_size: int, device: str) -> Inputs:
        """Random, and equal for equal arguments."""
        dice = torch.Generator().manual_seed(0)
        normal = partial(torch.randn, generator=dice)
        student = normal(TOKENS, hidden_size)
        teacher = student + 0.5 * normal(TOKENS, hidden_size)
        weight = nn.Parameter((2 * hidden_size**-0.5 * normal(VOCABULARY, hidden_size)).to(device))
        rows = (1 + torch.randperm(TOKENS - 1, generator=dice)[:POLICY_ROWS]).sort().values
        batch = SearchBatch(
            PackedSequences.pack([torch.randint(VOCABULARY, (TOKENS,), generator=dice).tolist()]),
            policy_weight=torch.zeros(TOKENS).index_fill(0, rows, 1 / POLICY_ROWS),
            sampled_logprobs=torch.zeros(TOKENS),
            advantages=normal(TOKENS),
            query_row=rows[: QUERY_ROWS * 2 : 2],
            query_weight=torch.full((QUERY_ROWS,), 1 / QUERY_ROWS),
            query_label=torch.zeros(QUERY_ROWS),
            span_kind=torch.zeros(TOKENS, dtype=torch.long),
            on_policy=True,
        )
        return cls(student.to(device).requires_grad_(), teacher.to(device), weight, batch.to(device))

    @property
    def head(self) -> Head:
        return Head(lambda rows: linear(rows, self.weight), (self.weight,), len(self.weight))

    @property
    def controls(self) -> ControlTokens:
        """None: all tokens are compared."""
        none = self.batch.query_row[:0]
        return ControlTokens(none, none, is_excluded=False)

    @property
    def query(self) -> Tensor:
        """[Q] rows that predict query tokens."""
        return self.batch.query_row - 1

    @property
    def policy(self) -> Tensor:
        """[R] rows that predict tokens of the policy."""
        return self.batch.policy_weight.nonzero()[:, 0] - 1

    @property
    def tokens(self) -> Tensor:
        """[R] tokens that the policy wrote."""
        return self.batch.token_ids[self.policy + 1]

    def policy_loss(self, logprobs: Tensor) -> Tensor:
        """From their log-probs [R]; the ratio is 1."""
        weight = (self.batch.policy_weight * self.batch.advantages)[self.policy + 1]
        return -((logprobs - logprobs.detach()).exp() * weight).sum()


Loss = Callable[[Inputs], Tensor]


def textbook_jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """[Q] at beta 0.5."""
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    mixture = torch.logaddexp(student, teacher) - torch.tensor(2.0).log()
    return 0.5 * ((teacher.exp() * (teacher - mixture)).sum(-1) + (student.exp() * (student - mixture)).sum(-1))


def naive_jsd(inputs: Inputs) -> Tensor:
    """All logits of both sides, and a mask at the end."""
    student = linear(inputs.student, inputs.weight)
    with torch.no_grad():
        teacher = linear(inputs.teacher, inputs.weight)
    mask = torch.zeros(TOKENS, device=student.device).index_fill(0, inputs.query, 1)
    return (textbook_jsd(student, teacher) * mask).sum() / mask.sum()


def trl_jsd(inputs: Inputs) -> Tensor:
    """TRL's chunked divergence on gathered rows."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = inputs.student[inputs.query], inputs.teacher[inputs.query]
    arguments = (student, inputs.weight, None, teacher, inputs.weight.detach(), None, 0.5)
    return ChunkedDivergenceFunction.apply(*arguments)[0].mean()


def liger_jsd(inputs: Inputs) -> Tensor:
    """Liger's fused linear JSD on gathered rows, in one chunk."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    settings = {"weight_hard_loss": 0, "weight_soft_loss": 1, "beta": 0.5, "chunk_size": QUERY_ROWS}
    student, teacher = inputs.student[inputs.query], inputs.teacher[inputs.query]
    fused, labels = LigerFusedLinearJSDLoss(**settings, compiled=False), inputs.batch.query_row  # ignores none of them
    return fused(student, inputs.weight, teacher, inputs.weight.detach(), labels)


def our_jsd(inputs: Inputs, divergence: Divergence = EXACT, mixture: Sequence[float] | None = (1.0,)) -> Tensor:
    """The library's reading of query rows, by itself."""
    teacher = teacher_rows(inputs, divergence)

    def read(chunk: Chunk) -> tuple[Tensor, None]:
        rows = teacher.at(chunk.rows)
        found = divergence_to_teacher(divergence, chunk.logits, rows, chunk.paired, inputs.controls)
        return (found * inputs.batch.query_weight[chunk.rows]).sum()[None], None

    reading = Reading(inputs.batch.query_row, read, teacher.hidden)
    return read_rows(inputs.head, [inputs.student[inputs.query]], [reading], mixture).terms[0]


@torch.no_grad()
def teacher_rows(inputs: Inputs, divergence: Divergence) -> TeacherRows:
    """What the module keeps of its teacher: read here for a limited support, only hidden rows for the vocabulary."""
    hidden, tokens = inputs.teacher[inputs.query], inputs.batch.token_ids[inputs.batch.query_row]
    top_k = divergence.teacher_top_k
    if top_k is None:
        zero = hidden.new_zeros(len(hidden))
        tops = zero[:, None].long(), zero[:, None]
        return TeacherRows(None, None, hidden, zero, zero, zero, zero, *tops)

    def read(chunk: Chunk) -> tuple[Tensor, TeacherRows]:
        rows = summarize_teacher(chunk.logits, chunk.hidden, tokens[chunk.rows], top_k, inputs.controls)
        return chunk.logits.new_zeros(0), rows

    return join(read_rows(inputs.head, [hidden], [Reading(inputs.batch.query_row, read)], None).kept[0])


def textbook_step(inputs: Inputs) -> Tensor:
    """Both terms by plain formulas; to compare with, and never timed."""
    logprobs = linear(inputs.student[inputs.policy], inputs.weight).log_softmax(-1)
    chosen = logprobs.gather(1, inputs.tokens[:, None])[:, 0]
    student, teacher = (linear(x[inputs.query], inputs.weight) for x in (inputs.student, inputs.teacher))
    return inputs.policy_loss(chosen) + textbook_jsd(student, teacher.detach()).mean()


def trl_step(inputs: Inputs) -> Tensor:
    """TRL's two functions, one after the other; the entropy is for the log, as in its trainer."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows = inputs.student[inputs.policy]
    arguments = (inputs.weight, None, inputs.tokens, 1.0, TRL_CHUNK, None, 1.0, ("entropy",))
    return inputs.policy_loss(ChunkedLogProbFunction.apply(rows, *arguments)[0]) + trl_jsd(inputs)


def our_step(inputs: Inputs, divergence: Divergence = EXACT, is_fused: bool = True) -> Tensor:
    """`Student.step` on these rows: with everything it counts for the report."""

    def policy(sequences: object, readings: Sequence[Reading], mixture: Sequence[float]) -> Outcome:
        rows = [inputs.student[reading.targets - 1] for reading in readings]
        return read_rows(inputs.head, rows, readings, mixture if is_fused else None)

    teacher = teacher_rows(inputs, divergence)
    student = Student(inputs.batch, POLICY_TERMS, divergence, Distillation(), teacher, inputs.controls)
    sums = student.step(policy, jsd_weight=1.0)  # type: ignore[arg-type]  # called, no more
    return total_loss(sums.terms, POLICY_TERMS.coefficients(1.0))


JSD: Mapping[str, Loss] = {NAIVE: naive_jsd, TRL: trl_jsd, LIGER: liger_jsd, OURS: our_jsd}
STEP: Mapping[str, Loss] = {TRL: trl_step, OURS: our_step}
PARTS: Mapping[str, Mapping[str, Loss]] = {
    "jsd": {**JSD, PLAIN: partial(our_jsd, mixture=None), TOP: partial(our_jsd, divergence=TOP_50)},
    "step": {**STEP, PLAIN: partial(our_step, is_fused=False), TOP: partial(our_step, divergence=TOP_50)},
}
REFERENCES = {"jsd": naive_jsd, "step": textbook_step}
