"""Step metrics: sums that add up over micro-batches and ranks, and means by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.losses.terms import Terms
from sdsearch_lightning.step.control_tokens import ControlTokens
from sdsearch_lightning.step.metrics import (
    DISTILLATION_SUMS,
    POLICY_SUMS,
    distillation_sums,
    policy_sums,
    step_means,
)
from sdsearch_lightning.step.teacher_rows import TeacherRows, Verdict, summarize_teacher

R, V = 7, 5
CONTROLS = ControlTokens(torch.tensor([1, 3]), torch.tensor([2]), is_excluded=True)


def logprobs(rows: int, seed: int = 0) -> Tensor:
    logits = torch.randn(rows, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(-1)


def teacher_rows(rows: Tensor) -> TeacherRows:
    return summarize_teacher(rows, rows, torch.zeros(len(rows), dtype=torch.long), None, CONTROLS)


def verdict(*log_ratios: float) -> Verdict:
    """Every other advantage changed, and a gate of 0.25."""
    rows = torch.tensor(log_ratios, dtype=torch.float64)
    return Verdict(rows, rows, torch.full_like(rows, 0.25), torch.arange(len(rows)) % 2 == 0)


def entropy_by_hand(row: list[float]) -> float:
    return -math.fsum(math.exp(x) * x for x in row)


def test_policy_sums_by_hand() -> None:
    rows = logprobs(R)
    chosen = rows[:, 2]
    gaps = torch.tensor(
        [0.0, 0.17, 0.19, -0.21, -0.24, 0.3, 0.0], dtype=torch.float64
    )  # log 1.2 = .182, log .8 = -.223
    searched = torch.tensor([False, True, False, False, True, False, False])
    sums = policy_sums(rows, chosen, chosen - 2 * gaps, chosen - gaps, searched, 0.2, 0.2)
    assert sums["policy_tokens"].item() == R
    assert sums["clipped"].item() == 3
    assert sums["logprob_gap"].item() == pytest.approx(2 * gaps.abs().sum().item(), abs=1e-12)
    assert sums["entropy"].item() == pytest.approx(math.fsum(map(entropy_by_hand, rows.tolist())), abs=1e-12)
    assert sums["searched_tokens"].item() == 2
    assert sums["query_entropy"].item() == pytest.approx(
        sum(entropy_by_hand(rows[i].tolist()) for i in (1, 4)), abs=1e-12
    )
    assert policy_sums(rows, chosen, chosen, chosen - gaps, searched, 0.2, 0.28)["clipped"].item() == 2


def test_distillation_sums_by_hand() -> None:
    student, teacher = logprobs(3, 1), logprobs(3, 2)
    jsd = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    sums = distillation_sums(jsd, student, student[:, 4], teacher_rows(teacher), CONTROLS, verdict(0.5, -2.0, 0.25))
    assert sums["student_logprob"].item() == pytest.approx(student[:, 4].sum().item())
    assert sums["teacher_logprob"].item() == pytest.approx(teacher[:, 0].sum().item())
    assert sums["query_tokens"].item() == 3
    assert sums["jsd"].item() == pytest.approx(0.6)
    assert (sums["abs_log_ratio"].item(), sums["changed_advantages"].item(), sums["gate"].item()) == (2.75, 2, 0.75)
    for name, rows in (("student", student), ("teacher", teacher)):
        assert sums[f"{name}_entropy"].item() == pytest.approx(math.fsum(map(entropy_by_hand, rows.tolist())))
        mass = math.fsum(math.exp(row[1]) + math.exp(row[3]) for row in rows.tolist())
        assert sums[f"environment_mass_{name}"].item() == pytest.approx(mass)
        assert sums[f"policy_tag_mass_{name}"].item() == pytest.approx(sum(math.exp(row[2]) for row in rows.tolist()))
    assert set(sums) == set(DISTILLATION_SUMS)


def test_sums_carry_no_graph() -> None:
    rows = logprobs(3).requires_grad_()
    sums = policy_sums(rows, rows[:, 0], rows[:, 0], rows[:, 0], torch.ones(3, dtype=torch.bool), 0.2, 0.2)
    sums |= distillation_sums(rows[:, 0], rows, rows[:, 1], teacher_rows(rows), CONTROLS, verdict(1.0, 1.0, 1.0))
    assert not any(value.requires_grad for value in sums.values())


@pytest.mark.parametrize("cuts", [(0, R), (0, 1, 3, R), (0, 0, R)])
def test_sums_add_up_over_micro_batches(cuts: tuple[int, ...]) -> None:
    rows, gaps = logprobs(R), torch.linspace(-0.5, 0.5, R, dtype=torch.float64)
    searched = torch.arange(R) % 2 == 0
    total: Counter[str] = Counter()
    for a, b in pairwise(cuts):
        chosen = rows[a:b, 0]
        total.update(
            {
                k: float(v)
                for k, v in policy_sums(rows[a:b], chosen, chosen, chosen - gaps[a:b], searched[a:b], 0.2, 0.2).items()
            }
        )
    whole = policy_sums(rows, rows[:, 0], rows[:, 0], rows[:, 0] - gaps, searched, 0.2, 0.2)
    assert total == pytest.approx({name: float(value) for name, value in whole.items()})


def totals(**values: float) -> dict[str, float]:
    return dict.fromkeys(("loss", *Terms._fields, *POLICY_SUMS, *DISTILLATION_SUMS), 0.0) | values


def test_step_means_by_hand() -> None:
    means = step_means(
        totals(
            loss=3.0,
            policy_loss=2.0,
            kl=0.5,
            entropy_loss=0.6,
            searched_tokens=5.0,
            query_entropy=3.0,
            student_logprob=-6.0,
            teacher_logprob=-2.0,
            jsd_loss=0.8,
            policy_tokens=20.0,
            entropy=40.0,
            clipped=5.0,
            logprob_gap=1.0,
            query_tokens=4.0,
            jsd=1.2,
            student_entropy=8.0,
            teacher_entropy=6.0,
            environment_mass_student=0.4,
            environment_mass_teacher=0.2,
            policy_tag_mass_student=0.8,
            policy_tag_mass_teacher=1.6,
            abs_log_ratio=5.0,
            changed_advantages=3.0,
            gate=1.0,
        ),
        num_updates=2,
    )
    assert means == pytest.approx(
        {
            "train/loss": 1.5,
            "train/policy_loss": 1.0,
            "train/kl": 0.25,
            "train/entropy_loss": 0.3,
            "train/query_entropy": 0.6,
            "distill/student_logprob": -1.5,
            "distill/teacher_logprob": -0.5,
            "train/entropy": 2.0,
            "train/clip_fraction": 0.25,
            "train/logprob_gap": 0.05,
            "train/policy_tokens": 20.0,
            "distill/loss": 0.4,
            "distill/jsd": 0.3,
            "distill/student_entropy": 2.0,
            "distill/teacher_entropy": 1.5,
            "distill/entropy_gap": 0.5,
            "distill/environment_mass_student": 0.1,
            "distill/environment_mass_teacher": 0.05,
            "distill/policy_tag_mass_student": 0.2,
            "distill/policy_tag_mass_teacher": 0.4,
            "distill/abs_log_ratio": 1.25,
            "distill/changed_advantages": 0.75,
            "distill/gate": 0.25,
            "distill/teacher_rows": 4.0,
        }
    )


def test_a_step_without_teacher_says_nothing_of_it() -> None:
    means = step_means(totals(policy_tokens=2.0), 1)
    assert {name for name in means if name.startswith("distill/")} == {"distill/teacher_rows"}


def test_a_step_without_tokens_is_finite() -> None:
    assert set(step_means(totals(), 1).values()) == {0.0}
