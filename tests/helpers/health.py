"""Series of metrics: healthy ones, and one per rule that is not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

from sdsearch_lightning.callbacks import TrainingHealth

HEALTHY_METRICS = {
    "train/loss": 0.01,
    "train/skipped_updates": 0.0,
    "train/entropy": 0.3,
    "train/kl": 0.05,
    "train/grad_norm": 0.1,
    "train/update_ratio": 0.005,
    "train/logprob_gap": 1e-6,
    "rollout/valid_action_rate": 0.98,
    "rollout/searches_per_question": 2.0,
    "rollout/tagged_query_rate": 0.005,
    "distill/environment_mass_student": 1e-4,
    "distill/environment_mass_teacher": 1e-4,
    "distill/policy_tag_mass_student": 2e-3,
    "distill/policy_tag_mass_teacher": 2e-3,
    "distill/jsd": 0.05,
    "rollout/answered_rate": 0.98,
    "rollout/truncated_rate": 0.02,
    "rollout/policy_tokens": 26.0,
    "rollout/all_correct_groups": 0.2,
    "rollout/all_incorrect_groups": 0.2,
    "rollout/reward": 0.5,
}
"""As in the quick start."""

PLANTED_FAULTS = {
    "not_finite": ("train/skipped_updates", 1.0),
    "entropy_collapse": ("train/entropy", 0.004),
    "entropy_explosion": ("train/entropy", 0.8),
    "kl": ("train/kl", 1.4),
    "grad_norm": ("train/grad_norm", 1.5),
    "update_ratio": ("train/update_ratio", 0.2),
    "logprob_gap": ("train/logprob_gap", 0.3),
    "valid_actions": ("rollout/valid_action_rate", 0.7),
    "searches": ("rollout/searches_per_question", 0.6),
    "tagged_queries": ("rollout/tagged_query_rate", 0.2),
    "environment_mass": ("distill/environment_mass_student", 6e-4),
    "teacher_environment_mass": ("distill/environment_mass_teacher", 0.06),
    "policy_tag_mass": ("distill/policy_tag_mass_student", 9e-3),
    "teacher_policy_tag_mass": ("distill/policy_tag_mass_teacher", 9e-3),
    "jsd": ("distill/jsd", 0.13),
    "answers": ("rollout/answered_rate", 0.6),
    "truncation": ("rollout/truncated_rate", 0.6),
    "length": ("rollout/policy_tokens", 65.0),
    "all_correct": ("rollout/all_correct_groups", 1.0),
    "all_incorrect": ("rollout/all_incorrect_groups", 1.0),
    "reward": ("rollout/reward", 0.3),
}
"""What sets off each rule, from HEALTHY_METRICS."""


def healthy_series(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """Steps of a run that fares well, 15 % of noise on each value."""
    draw = random.Random(seed)
    noisy = [{key: value * draw.uniform(0.85, 1.15) for key, value in HEALTHY_METRICS.items()} for _ in range(steps)]
    return [{key: min(value, 1.0) if "rate" in key else value for key, value in values.items()} for values in noisy]


def planted_series(name: str, steps: int) -> list[dict[str, float]]:
    key, value = PLANTED_FAULTS[name]
    return [HEALTHY_METRICS | {key: value}] * steps


def begun_alarms(health: TrainingHealth, series: Iterable[Mapping[str, float]]) -> list[tuple[int, str]]:
    """Index of the step and name of each alarm."""
    return [(step, name) for step, values in enumerate(series) for name in health.judge(values)]
