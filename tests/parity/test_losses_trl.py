"""Losses and advantages against TRL's own code, which is called, not rewritten.

Known, wanted differences (both set aside here): TRL adds 1e-4 to the standard deviation where we add 1e-6, and weights
its KL term by the importance ratio unless `use_bias_correction_kl` is False.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdsearch_lightning.losses.divergences import JensenShannon
from sdsearch_lightning.losses.terms import clipped_surrogate, jensen_shannon, kl_k3
from sdsearch_lightning.losses.weights import aggregate
from sdsearch_lightning.scoring.advantages import group_relative

pytest.importorskip("trl")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

N, T, MAX_LENGTH = 6, 9, 16
MODES = {"bnpo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental rooms warn at import
        from trl import GRPOTrainer
        from trl.experimental.gkd import GKDTrainer
        from trl.experimental.sdpo import loss_utils
        from trl.trainer.utils import nanstd
    return SimpleNamespace(GRPOTrainer=GRPOTrainer, GKDTrainer=GKDTrainer, sdpo=loss_utils, nanstd=nanstd)


def randn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_jensen_shannon_is_generalized_jsd_loss(trl: SimpleNamespace, beta: float) -> None:
    def theirs(student: Tensor) -> Tensor:
        per_token = trl.GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta, reduction="none")
        return per_token[0].sum(-1)

    student, teacher = randn(20, 50, seed=0, scale=3).requires_grad_(), randn(20, 50, seed=1, scale=3)
    assert close(jensen_shannon(student, teacher, beta), theirs(student))
    assert not close(jensen_shannon(student, teacher + 1e-3, beta, 30), theirs(student))
    assert close(jensen_shannon(teacher, student, beta), theirs(student)) == (beta == 0.5)
    (ours_gradient,) = torch.autograd.grad(jensen_shannon(student, teacher, beta).sum(), student)
    (theirs_gradient,) = torch.autograd.grad(theirs(student).sum(), student)
    assert close(ours_gradient, theirs_gradient)
    assert not close(ours_gradient * 1.001, theirs_gradient)


@pytest.mark.parametrize("beta", [0, 0.5, 0.9, 1])
@pytest.mark.parametrize("tail", ["renormalize", "bucket"])
def test_the_students_support_is_sdpos(trl: SimpleNamespace, beta: float, tail: Any) -> None:
    def theirs(student: Tensor) -> Tensor:
        return trl.sdpo.compute_topk_self_distillation_loss(
            student, teacher, distillation_topk=7, distillation_alpha=beta, distillation_add_tail=tail == "bucket"
        )

    student, teacher = randn(20, 50, seed=2, scale=3).requires_grad_(), randn(20, 50, seed=3, scale=3)
    ours = JensenShannon(beta, 7, "student", tail).divergence(student, teacher)
    assert close(ours, theirs(student))
    assert not close(JensenShannon(beta, 8, "student", tail).divergence(student, teacher), theirs(student))
    assert not close(JensenShannon(beta, 7, "teacher", tail).divergence(student, teacher), theirs(student))
    (ours_gradient,) = torch.autograd.grad(ours.sum(), student)
    (theirs_gradient,) = torch.autograd.grad(theirs(student).sum(), student)
    assert close(ours_gradient, theirs_gradient)
    assert not close(ours_gradient * 1.001, theirs_gradient)


@pytest.mark.parametrize("beta", [0, 0.5, 0.9, 1])
def test_the_teachers_support_is_sdpos_with_the_sides_swapped(trl: SimpleNamespace, beta: float) -> None:
    student, teacher = randn(20, 50, seed=2, scale=3), randn(20, 50, seed=3, scale=3)
    theirs = trl.sdpo.compute_topk_self_distillation_loss(
        teacher, student, distillation_topk=7, distillation_alpha=1 - beta, distillation_add_tail=False
    )
    assert close(jensen_shannon(student, teacher, beta, 7), theirs)
    assert not close(jensen_shannon(student, teacher, beta, 8), theirs)


def grpo_batch() -> dict[str, Tensor]:
    mask = torch.rand(N, T, generator=torch.Generator().manual_seed(4)) < 0.6
    mask[2] = False  # a rollout without a counted token
    mask[3] = True
    sampled = -randn(N, T, seed=5).abs()
    return {
        "prompt_ids": torch.zeros(N, 1, dtype=torch.long),
        "prompt_mask": torch.ones(N, 1, dtype=torch.long),
        "completion_ids": torch.zeros(N, T, dtype=torch.long),
        "completion_mask": torch.ones(N, T, dtype=torch.long),
        "tool_mask": mask.long(),
        "advantages": randn(N, seed=6),
        "old_per_token_logps": sampled,
        "ref_per_token_logps": sampled + randn(N, T, seed=7, scale=0.2),
    }


def trl_grpo_loss(
    trl: SimpleNamespace, loss_type: str, policy: Tensor, batch: dict[str, Tensor], beta: float
) -> Tensor:
    """GRPOTrainer._compute_loss itself, on a stand-in that holds the options it reads."""
    one_process = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
    )
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (policy, torch.zeros_like(policy), None),
        accelerator=one_process,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        beta=beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.3,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type=loss_type,
        max_completion_length=MAX_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    return trl.GRPOTrainer._compute_loss(trainer, None, batch)


@pytest.mark.parametrize("loss_type", MODES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_grpo_loss_and_gradient(trl: SimpleNamespace, loss_type: str, kl_coef: float) -> None:
    batch = grpo_batch()
    mask = batch["tool_mask"].bool()
    policy = (batch["old_per_token_logps"] + randn(N, T, seed=8, scale=0.4)).requires_grad_()

    def ours(clip_high: float = 0.3) -> Tensor:
        values = clipped_surrogate(policy, batch["old_per_token_logps"], batch["advantages"][:, None], 0.2, clip_high)
        values = values + kl_coef * kl_k3(policy, batch["ref_per_token_logps"])
        return aggregate(values, mask, MODES[loss_type], norm=MAX_LENGTH)  # type: ignore[arg-type]

    theirs = trl_grpo_loss(trl, loss_type, policy, batch, kl_coef)
    assert close(ours(), theirs)
    assert not close(ours(clip_high=0.25), theirs)
    (ours_gradient,) = torch.autograd.grad(ours(), policy)
    (theirs_gradient,) = torch.autograd.grad(theirs, policy)
    assert close(ours_gradient, theirs_gradient)
    assert not close(ours_gradient * 1.001, theirs_gradient)


def test_advantages_use_the_same_standard_deviation(trl: SimpleNamespace) -> None:
    rewards = randn(8, 5, seed=9)
    theirs = (rewards - rewards.mean(1, keepdim=True)) / (trl.nanstd(rewards, dim=1)[:, None] + 1e-4)
    assert close(group_relative(rewards, eps=1e-4), theirs)
    assert not close(group_relative(rewards), theirs)
