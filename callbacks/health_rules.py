"""The named rules of TrainingHealth: how a collapse shows in the metrics of a step, and what to try then.

Invariant: a verdict depends on the values seen so far and on nothing else, so a resumed run and every rank judge alike.
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
    "policy_tokens grad_norm update_ratio lr teacher_seconds student_seconds optimizer_seconds",
    "distill": "weight groups groups_without_queries groups_over_budget dropped_entries teacher_rows loss jsd jsd_p95 "
    "effective_weight student_logprob teacher_logprob student_entropy teacher_entropy entropy_gap "
    "environment_mass_student environment_mass_teacher policy_tag_mass_student policy_tag_mass_teacher "
    "abs_log_ratio changed_advantages gate",
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


def make_rules(
    defaults: Mapping[str, HealthRule], changes: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, HealthRule]:
    """The default rules with changes: fields replaced, None for a rule that is off, a new name for a new rule.

    Args:
        defaults: rules by name.
        changes: by name of the rule.
    """
    rules: dict[str, HealthRule] = dict(defaults)
    known = tuple(field.name for field in fields(HealthRule))
    for name, change in changes.items():
        if change is None:
            _known("rule to switch off", name, tuple(defaults))
            del rules[name]
            continue
        for key in change:
            _known(f"field of rule {name!r}", key, known)
        if name in defaults:
            rules[name] = replace(defaults[name], **change)
        elif missing := [key for key in ("metric", "how", "bound") if key not in change]:
            raise ConfigError(
                f"TrainingHealth: rule {name!r} is none of {', '.join(defaults)}; a new one needs {', '.join(missing)}."
            )
        else:
            rules[name] = HealthRule(**change)
    return rules
