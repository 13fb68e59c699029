"""Each rule on a planted series and on a healthy one, and how rules are changed, added and refused."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from helpers.health import HEALTHY_METRICS, PLANTED_FAULTS, begun_alarms, healthy_series, planted_series
from helpers.metrics_page import METRICS_PAGE, read_page
from sdsearch_lightning.callbacks import TrainingHealth
from sdsearch_lightning.callbacks.health_defaults import RULES
from sdsearch_lightning.callbacks.health_rules import SETTLE, WATCHABLE
from sdsearch_lightning.errors import ConfigError

# Rules


def test_every_rule_has_a_planted_series() -> None:
    assert set(PLANTED_FAULTS) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_after_its_patience_and_no_other_does(name: str) -> None:
    health, patience = TrainingHealth(), RULES[name].patience
    assert begun_alarms(health, [*healthy_series(12), *planted_series(name, patience - 1), *healthy_series(1)]) == []
    assert begun_alarms(health, planted_series(name, patience + 5)) == [(patience - 1, name)]
    assert [other for other, watch in health.watches.items() if watch.in_alarm] == [name]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(seed: int) -> None:
    health = TrainingHealth()
    assert begun_alarms(health, healthy_series(200, seed)) == []
    assert not any(watch.steps_out for watch in health.watches.values())


def test_learning_is_no_collapse() -> None:
    """Reward and KL up, entropy and JSD down, over 40 steps as the quick start has them."""
    steps = [
        values
        | {
            "rollout/reward": 0.06 + 0.02 * step + 0.1 * (step % 2) * (step > 10),
            "train/kl": 0.005 * step,
            "train/entropy": 0.3 * 0.96**step,
            "distill/jsd": 0.07 * 0.95**step,
        }
        for step, values in enumerate(healthy_series(40))
    ]
    assert begun_alarms(TrainingHealth(), steps) == []


def test_an_alarm_is_told_once_per_episode() -> None:
    health = TrainingHealth()
    bad, good = planted_series("kl", 2), healthy_series(1)
    # One good step is not the end of an episode, two (the patience) are.
    assert begun_alarms(health, [*bad, *good, *bad, *good * 2, *bad]) == [(1, "kl"), (8, "kl")]


def test_a_step_without_the_metric_leaves_its_rule_as_it_is() -> None:
    health = TrainingHealth()
    silent = {key: value for key, value in HEALTHY_METRICS.items() if key != "train/kl"}
    assert begun_alarms(health, [*planted_series("kl", 1), silent, silent, *planted_series("kl", 1)]) == [(3, "kl")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_alarm_of_its_own_and_enters_no_average(value: float) -> None:
    health = TrainingHealth()
    begun_alarms(health, healthy_series(10))
    before = health.watches["grad_norm"].average
    assert begun_alarms(health, [HEALTHY_METRICS | {"train/grad_norm": value}]) == [(0, "not_finite")]
    assert health.watches["grad_norm"].average == before


def test_a_collapse_does_not_drag_its_own_bound_along() -> None:
    health = TrainingHealth()
    steps = [HEALTHY_METRICS | {"train/grad_norm": 0.1 * 1.6**step} for step in range(40)]
    assert [name for _, name in begun_alarms(health, [*healthy_series(10), *steps])] == ["grad_norm"]
    assert health.watches["grad_norm"].in_alarm


def test_relative_rules_sleep_while_their_reference_is_noise() -> None:
    health = TrainingHealth()
    assert (
        begun_alarms(health, [HEALTHY_METRICS | {"rollout/reward": reward} for reward in (0.12, 0.1, 0.01, 0.0, 0.0)])
        == []
    )
    noise = [HEALTHY_METRICS | {"train/grad_norm": norm} for norm in (1e-4, 1e-4, 5.0, 5.0)]
    assert len(noise) < SETTLE and begun_alarms(TrainingHealth(), noise) == []


def test_the_loop_of_environment_tokens_is_seen_before_the_reward_falls() -> None:
    """Masses as measured in a run that collapsed; its reward fell from step 34 on."""
    masses = {step: (0.0001, 0.0009) for step in range(1, 21)} | {
        30: (0.002, 0.018),
        33: (0.017, 0.12),
        35: (0.14, 0.44),
    }
    found = {}
    health = TrainingHealth()
    for step, (student, teacher) in masses.items():
        masses_now = {"distill/environment_mass_student": student, "distill/environment_mass_teacher": teacher}
        for name in health.judge(HEALTHY_METRICS | masses_now):
            found[name] = step
    assert found == {"teacher_environment_mass": 33, "environment_mass": 33}


# Configuration


def test_rules_can_be_changed_switched_off_and_added() -> None:
    health = TrainingHealth(
        rules={
            "kl": {"bound": 2, "patience": 1},
            "length": None,
            "clipping": {"metric": "train/clip_fraction", "how": "above", "bound": 0.2, "patience": 1},
        }
    )
    assert begun_alarms(health, [HEALTHY_METRICS | {"train/kl": 1.9, "train/clip_fraction": 0.1}]) == []
    assert begun_alarms(health, [HEALTHY_METRICS | {"train/kl": 2.1, "train/clip_fraction": 0.3}]) == [
        (0, "kl"),
        (0, "clipping"),
    ]
    assert begun_alarms(health, [*healthy_series(9), *planted_series("length", 9)]) == []
    assert TrainingHealth().rules == RULES, "the defaults are left alone"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "halt"}, "action: found 'halt', expected one of warn, reduce, stop"),
        ({"rules": {"kl": {"action": "halt"}}}, "action: found 'halt', expected one of warn, reduce, stop"),
        ({"rules": {"kl": {"metric": "train/kll"}}}, "metric: found 'train/kll', expected one of .*train/kl, "),
        ({"rules": {"kl": {"how": "over"}}}, "how: found 'over', expected one of above, below, above_average"),
        ({"rules": {"kl": {"limit": 1}}}, "field of rule 'kl': found 'limit', expected one of metric, how, bound"),
        ({"rules": {"kl": {"bound": math.nan}}}, "bound of a rule: expected a finite number, found nan"),
        ({"rules": {"kl": {"bound": "1"}}}, "bound of a rule: expected a finite number, found '1'"),
        ({"rules": {"kl": {"patience": 0}}}, "patience of a rule: expected a whole number of at least 1, found 0"),
        ({"rules": {"kll": None}}, "rule to switch off: found 'kll', expected one of not_finite, "),
        ({"rules": {"kll": {"bound": 1}}}, "rule 'kll' is none of not_finite.*a new one needs metric, how"),
        ({"lr_factor": 1.5}, "lr_factor: expected a factor from 0 to 1, found 1.5"),
        ({"jsd_factor": math.nan}, "jsd_factor: expected a factor from 0 to 1, found nan"),
    ],
)
def test_what_cannot_work_is_refused_with_what_there_is(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingHealth(**arguments)


def test_what_can_be_watched_is_what_training_steps_log() -> None:
    page = read_page(METRICS_PAGE.read_text())
    logged = page.keys | {f"rollout/{score}" for score in page.scores - {"questions"}}
    assert set(WATCHABLE) == {key for key in logged if key.split("/")[0] in ("rollout", "search", "train", "distill")}


def test_the_page_lists_the_rules() -> None:
    rows = re.findall(r"^\| (\w+) \| .*`([a-z]+/\w+)`.* \| (\d+) \|$", METRICS_PAGE.read_text(), flags=re.MULTILINE)
    assert rows == [(name, rule.metric, str(rule.patience)) for name, rule in RULES.items()]
