"""What is kept of the teacher is enough for the loss, exact, and carries no graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.losses.divergences import Divergence, JensenShannon
from sdsearch_lightning.losses.logprobs import entropy
from sdsearch_lightning.losses.terms import jensen_shannon
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.teacher_rows import NUM_TOP, TeacherRows, divergence_to_teacher, summarize_teacher

Q, V, H = 6, 11, 4
NONE = torch.zeros(0, dtype=torch.long)
NO_CONTROLS = ControlTokens(NONE, NONE, is_excluded=True)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def summary(logits: Tensor, top_k: int | None, controls: ControlTokens = NO_CONTROLS) -> TeacherRows:
    tokens = torch.arange(len(logits)) % logits.shape[-1]
    return summarize_teacher(logits, randn(len(logits), H), tokens, top_k, controls)


@pytest.mark.parametrize("top_k", [1, 3, V - 1])
def test_a_kept_support_gives_the_truncated_divergence(top_k: int) -> None:
    student, teacher = randn(Q, V, seed=1).requires_grad_(), randn(Q, V, seed=2)
    rows = summary(teacher, top_k)
    assert rows.hidden is None and rows.logits is not None and rows.logits.shape == (Q, top_k)
    kept = divergence_to_teacher(JensenShannon(top_k=top_k), student, rows, None, NO_CONTROLS)
    whole = jensen_shannon(student, teacher, top_k=top_k)
    torch.testing.assert_close(kept, whole, rtol=0, atol=1e-15)
    weights = torch.arange(1.0, Q + 1)
    ours, theirs = (torch.autograd.grad((value * weights).sum(), student)[0] for value in (kept, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    assert not torch.allclose(kept, jensen_shannon(student, teacher), atol=1e-4), "truncation shows"


@pytest.mark.parametrize("top_k", [None, V, V + 7])
def test_a_support_of_the_whole_vocabulary_keeps_hidden_rows_only(top_k: int | None) -> None:
    student, teacher = randn(Q, V, seed=1), randn(Q, V, seed=2).requires_grad_()
    rows = summary(teacher.detach(), top_k)
    assert rows.support is None and rows.logits is None
    assert rows.hidden is not None and torch.equal(rows.hidden, randn(Q, H))
    value = divergence_to_teacher(JensenShannon(top_k=top_k), student.requires_grad_(), rows, teacher, NO_CONTROLS)
    assert torch.equal(value, jensen_shannon(student, teacher))
    value.sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("top_k", [3, V - 3, V - 1, None])
def test_what_steers_a_rollout_is_left_out_of_the_support(top_k: int | None) -> None:
    """Both sides are distributions over the other tokens, however likely a tag is; the switch brings it back."""
    student, teacher = randn(Q, V, seed=1).requires_grad_(), randn(Q, V, seed=2)
    teacher[:, 7] = teacher[:, 7] + 9  # a tag that the teacher expects
    environment, policy = torch.tensor([4]), torch.tensor([0, 7])
    found = {}
    for is_excluded in (True, False):
        controls = ControlTokens(environment, policy, is_excluded)
        rows = summary(teacher, top_k, controls)
        found[is_excluded] = divergence_to_teacher(JensenShannon(top_k=top_k), student, rows, teacher, controls)
    others = [i for i in range(V) if i not in (0, 4, 7)]
    limit = None if top_k is None else min(top_k, len(others))
    expected = jensen_shannon(student[:, others], teacher[:, others], top_k=limit)
    torch.testing.assert_close(found[True], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found[False], jensen_shannon(student, teacher, top_k=top_k), rtol=0, atol=1e-12)
    assert (found[True] - found[False]).abs().min() > 1e-3
    gradient = torch.autograd.grad(found[True].sum(), student)[0]
    assert not gradient[:, [0, 4, 7]].any() and gradient[:, others].any()


def test_a_users_own_divergence_cannot_teach_the_teacher() -> None:
    class Squares(Divergence):
        def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
            return (student_logits - teacher_logits).square().sum(-1)

    student, teacher = randn(Q, V, seed=1).requires_grad_(), randn(Q, V, seed=2).requires_grad_()
    divergence_to_teacher(Squares(), student, summary(teacher.detach(), None), teacher, NO_CONTROLS).sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_what_the_report_tells_of_the_teacher() -> None:
    logits = randn(Q, V)
    rows = summary(logits, 3, ControlTokens(torch.tensor([2, 5]), torch.tensor([1]), is_excluded=False))
    for i, row in enumerate(logits.tolist()):
        total = math.fsum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row]
        assert rows.entropy[i].item() == pytest.approx(-math.fsum(x * math.log(x) for x in p), abs=1e-12)
        assert rows.logprob[i].item() == pytest.approx(math.log(p[i % V]), abs=1e-12)
        assert rows.environment_mass[i].item() == pytest.approx(p[2] + p[5], abs=1e-12)
        assert rows.policy_tag_mass[i].item() == pytest.approx(p[1], abs=1e-12)
        order = sorted(range(V), key=lambda token: -p[token])[:NUM_TOP]
        assert rows.top_ids[i].tolist() == order
        assert rows.top_probs[i].tolist() == pytest.approx([p[token] for token in order], abs=1e-12)


def test_a_small_vocabulary_and_no_environment_tokens() -> None:
    rows = summary(randn(2, 3), None)
    assert rows.top_ids.shape == (2, 3)
    assert rows.environment_mass.tolist() == [0, 0]


def test_half_precision_is_summed_up_in_float32() -> None:
    rows = summary(randn(Q, V).bfloat16(), None)
    assert {rows.entropy.dtype, rows.logprob.dtype, rows.top_probs.dtype} == {torch.float32}


def test_tokens_of_probability_zero_add_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [5.0, -math.inf, -math.inf, -math.inf]])
    assert entropy(logits.log_softmax(-1)).tolist() == pytest.approx([math.log(2), 0.0])
