"""The named rules of TrainingHealth: how a collapse shows in the metrics of a step, and what to try then.

Invariant: a verdict depends on the values seen so far and on nothing else, so a resumed run and every rank judge alike.

Sources of the default rules: collapses reported for GRPO on search (Search-R1 issues 88, 89 and 92, ZeroSearch 23,
ConvSearch-R1 6; arXiv:2512.04220) and for self-distillation (SDPO issue 25; arXiv:2601.18734, OPSD: entropy; SSPO,
RLCSD and CGTR: drift of length and turns), the loop of environment tokens on the embedded world, and the healthy
ranges of docs/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from sdsearch_lightning.errors import ConfigError

How = Literal["above", "below", "above_average", "below_average", "below_best", "not_finite"]
Action = Literal["warn", "reduce", "stop"]

METRICS = {
    "rollout": "exact_match f1 substring_match searches_per_question valid_action_rate answered_rate truncated_rate "
    "retrieval_error_rate reward signal_groups mixed_groups all_correct_groups all_incorrect_groups tokens "
    "policy_tokens reasoning_tokens query_tokens refine_tokens answer_tokens observation_tokens gold_in_passages "
    "gold_in_query gold_in_correct_query cut_passages tagged_query_rate seconds tokens_per_second",
    "search": "queries unique errors seconds",
    "train": "loss policy_loss kl entropy query_entropy entropy_loss skipped_updates clip_fraction logprob_gap "
    "policy_tokens grad_norm update_ratio lr",
    "distill": "weight groups groups_without_queries groups_over_budget dropped_entries teacher_rows loss jsd jsd_p95 "
    "effective_weight student_logprob teacher_logprob student_entropy teacher_entropy entropy_gap "
    "environment_mass_student environment_mass_teacher",
}
"""What a training step may log, by phase; docs/metrics.md says what each means."""
WATCHABLE = tuple(f"{phase}/{name}" for phase, names in METRICS.items() for name in names.split())
SETTLE = 5
"""Values that have to go into an average before rules compare with it."""
SLOW, RECENT = 20, 5
"""Steps of the running average, and of the one whose best is kept."""


def _known(what: str, found: object, there_is: Iterable[str]) -> None:
    if found not in tuple(there_is):
        raise ConfigError(f"TrainingHealth: {what}: found {found!r}, expected one of {', '.join(there_is)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRule:
    """One metric, the bound it must keep, and what its breach means."""

    metric: str
    """Key of docs/metrics.md that training steps log."""
    how: How
    """When a value is out of bounds. `above` and `below`: beyond `bound` itself. `above_average` and `below_average`:
    beyond `bound` times the running average of 20 steps. `below_best`: below `bound` times the best average of 5 steps
    so far. `not_finite`: more than `bound` skipped updates or watched values that are not finite."""
    bound: float
    patience: int = 3
    """Steps in a row out of bounds until the alarm, and within bounds until it is over."""
    at_least: float = 0.0
    """A rule with a reference sleeps while the reference is not above this: relative changes of noise mean nothing."""
    meaning: str = "out of bounds"
    advice: str = "look at trajectories.jsonl"
    action: Action | None = None
    """None: the action of the callback."""

    def __post_init__(self) -> None:
        """Refuse what cannot be judged."""
        _known("metric", self.metric, WATCHABLE)
        _known("how", self.how, get_args(How))
        if self.action is not None:
            _known("action", self.action, get_args(Action))
        for name in ("bound", "at_least"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"TrainingHealth: {name} of a rule: expected a finite number, found {value!r}.")
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise ConfigError(
                f"TrainingHealth: patience of a rule: expected a whole number of at least 1, found {self.patience!r}."
            )


@dataclass(slots=True)
class Watch:
    """What a rule remembers from step to step; plain values, for the checkpoint."""

    steps_out: int = 0
    steps_within: int = 0
    in_alarm: bool = False
    seen: int = 0
    """Values within bounds: only they enter the references, so a collapse cannot drag its own bound along."""
    average: float = 0.0
    recent: float = 0.0
    best: float = -math.inf
    """Highest `recent` average so far."""

    def limit(self, rule: HealthRule) -> float | None:
        """The bound as a value of the metric; None while the rule sleeps."""
        if rule.how in ("above", "below", "not_finite"):
            return rule.bound
        reference, needed = (self.best, 1) if rule.how == "below_best" else (self.average, SETTLE)
        return rule.bound * reference if self.seen >= needed and reference > rule.at_least else None

    def take(self, value: float) -> None:
        """Let a value into the references."""
        self.seen += 1
        self.average += (value - self.average) / min(self.seen, SLOW)
        self.recent += (value - self.recent) / min(self.seen, RECENT)
        self.best = max(self.best, self.recent)

    def judge(self, rule: HealthRule, value: float) -> bool:
        """Take the value of a step in; True where an alarm begins with it."""
        limit = self.limit(rule)
        is_out = limit is not None and (value < limit if rule.how.startswith("below") else value > limit)
        self.steps_out = self.steps_out + 1 if is_out else 0
        self.steps_within = 0 if is_out else self.steps_within + 1
        if not is_out:
            self.take(value)
        begins = not self.in_alarm and self.steps_out >= rule.patience
        self.in_alarm = begins or (self.in_alarm and self.steps_within < rule.patience)
        return begins


RULES: dict[str, HealthRule] = {
    "not_finite": HealthRule(
        metric="train/skipped_updates",
        how="not_finite",
        bound=0.0,
        patience=1,
        meaning="a gradient or a metric is not finite; such an update is skipped and changes no weight",
        advice="see phase `skipped` in trajectories.jsonl; lower the learning rate or jsd.weight, or use float32",
    ),
    "entropy_collapse": HealthRule(
        metric="train/entropy",
        how="below",
        bound=0.01,
        patience=5,
        meaning="the policy no longer explores, so groups become alike and nothing is learnt (OPSD)",
        advice="lower the learning rate or jsd.weight, or set model.entropy_coef",
    ),
    "entropy_explosion": HealthRule(
        metric="train/entropy",
        how="above_average",
        bound=2.0,
        patience=2,
        meaning="the policy dissolves",
        advice="lower the learning rate; raise model.kl_coef",
    ),
    "kl": HealthRule(
        metric="train/kl",
        how="above",
        bound=1.0,
        patience=2,
        meaning="the policy is far from its start",
        advice="lower the learning rate (5e-7 for 3B); raise model.kl_coef",
    ),
    "grad_norm": HealthRule(
        metric="train/grad_norm",
        how="above_average",
        bound=10.0,
        patience=2,
        meaning="the gradient explodes, which came before the collapses of Search-R1",
        advice="lower the learning rate; lengthen its warm-up",
    ),
    "update_ratio": HealthRule(
        metric="train/update_ratio",
        how="above",
        bound=0.02,
        patience=1,
        meaning="one update moves the weights by a fiftieth of their length or more: it overwrites what was learnt",
        advice="divide the learning rate by ten or more; lengthen its warm-up",
    ),
    "valid_actions": HealthRule(
        metric="rollout/valid_action_rate",
        how="below_best",
        bound=0.8,
        patience=1,
        meaning="the format is being lost",
        advice="go on from the best checkpoint with half the learning rate",
    ),
    "searches": HealthRule(
        metric="rollout/searches_per_question",
        how="below_best",
        bound=0.5,
        meaning="the policy stops to search and answers from memory (SSPO: turns 17.7 to 3.5)",
        advice="look for answers in the hindsight block (rollout/gold_in_query); lower jsd.weight",
    ),
    "tagged_queries": HealthRule(
        metric="rollout/tagged_query_rate",
        how="above",
        bound=0.1,
        patience=2,
        meaning="tags inside queries, the early form of a collapse",
        advice="check that the JSD positions leave the closing tag out (model.positions); lower jsd.weight",
    ),
    "environment_mass": HealthRule(
        metric="distill/environment_mass_student",
        how="above_average",
        bound=3.0,
        patience=2,
        at_least=2e-5,
        meaning="tokens that only the environment writes become likelier in queries: the loop begins while it is small",
        advice="check that the JSD positions leave the closing tag out (model.positions); lower jsd.weight",
    ),
    "teacher_environment_mass": HealthRule(
        metric="distill/environment_mass_teacher",
        how="above",
        bound=0.05,
        patience=1,
        meaning="the teacher expects tokens that only the environment writes; the student follows within a few steps",
        advice="check that the JSD positions leave the closing tag out (model.positions); lower jsd.weight",
    ),
    "jsd": HealthRule(
        metric="distill/jsd",
        how="above_average",
        bound=2.0,
        at_least=0.01,
        meaning="student and teacher drift apart instead of together",
        advice="lower jsd.weight, or use a teacher that moves slower (model.teacher)",
    ),
    "answers": HealthRule(
        metric="rollout/answered_rate",
        how="below_best",
        bound=0.7,
        patience=2,
        meaning="rollouts end without an answer",
        advice="look for loops in trajectories.jsonl; go on from the best checkpoint with half the learning rate",
    ),
    "truncation": HealthRule(
        metric="rollout/truncated_rate",
        how="above",
        bound=0.5,
        meaning="rollouts run into a budget: repetition, or budgets that are too small",
        advice="look for loops in trajectories.jsonl; raise rollout.max_tokens or max_turn_tokens if there are none",
    ),
    "length": HealthRule(
        metric="rollout/policy_tokens",
        how="above_average",
        bound=2.0,
        meaning="rollouts grow at once: padding or repetition (RLCSD, CGTR: drift of length)",
        advice="look for repetition in trajectories.jsonl; lower rollout.max_turn_tokens",
    ),
    "all_correct": HealthRule(
        metric="rollout/all_correct_groups",
        how="above",
        bound=0.95,
        patience=10,
        meaning="the questions are used up: nothing is left to learn from",
        advice="stop here, take harder questions, or set rollout.refill_attempts",
    ),
    "all_incorrect": HealthRule(
        metric="rollout/all_incorrect_groups",
        how="above",
        bound=0.95,
        patience=10,
        meaning="the questions are too hard for this policy: no rollout shows the way",
        advice="start from a better cold start, raise rollout.group_size, or take easier questions",
    ),
    "reward": HealthRule(
        metric="rollout/reward",
        how="below_best",
        bound=0.7,
        patience=1,
        at_least=0.15,
        meaning="what was learnt is being lost (stagnation, decay, collapse: arXiv:2512.04220)",
        advice="go on from the best checkpoint with half the learning rate",
    ),
}
"""The default rules."""


def make_rules(changes: Mapping[str, Mapping[str, Any] | None]) -> dict[str, HealthRule]:
    """The default rules with changes: fields replaced, None for a rule that is off, a new name for a new rule.

    Args:
        changes: by name of the rule.
    """
    rules: dict[str, HealthRule] = dict(RULES)
    known = tuple(field.name for field in fields(HealthRule))
    for name, change in changes.items():
        if change is None:
            _known("rule to switch off", name, tuple(RULES))
            del rules[name]
            continue
        for key in change:
            _known(f"field of rule {name!r}", key, known)
        if name in RULES:
            rules[name] = replace(RULES[name], **change)
        elif missing := [key for key in ("metric", "how", "bound") if key not in change]:
            raise ConfigError(
                f"TrainingHealth: rule {name!r} is none of {', '.join(RULES)}; a new one needs {', '.join(missing)}."
            )
        else:
            rules[name] = HealthRule(**change)
    return rules
