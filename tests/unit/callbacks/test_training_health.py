"""Each rule on a planted series and on a healthy one; what an alarm does; that nothing else changes."""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_metric_names import PAGE, read_page

from sdsearch_lightning.callbacks import JSDWeightScheduler, TrainingHealth
from sdsearch_lightning.callbacks.health_rules import RULES, SETTLE, WATCHABLE
from sdsearch_lightning.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You're resuming from")

HEALTHY = {
    "train/loss": 0.01,
    "train/skipped_updates": 0.0,
    "train/entropy": 0.3,
    "train/kl": 0.05,
    "train/grad_norm": 0.1,
    "train/update_ratio": 0.005,
    "rollout/valid_action_rate": 0.98,
    "rollout/searches_per_question": 2.0,
    "rollout/tagged_query_rate": 0.005,
    "distill/environment_mass_student": 1e-4,
    "distill/environment_mass_teacher": 1e-4,
    "distill/jsd": 0.05,
    "rollout/answered_rate": 0.98,
    "rollout/truncated_rate": 0.02,
    "rollout/policy_tokens": 26.0,
    "rollout/all_correct_groups": 0.2,
    "rollout/all_incorrect_groups": 0.2,
    "rollout/reward": 0.5,
}
"""As in the quick start."""

PLANTED = {
    "not_finite": ("train/skipped_updates", 1.0),
    "entropy_collapse": ("train/entropy", 0.004),
    "entropy_explosion": ("train/entropy", 0.8),
    "kl": ("train/kl", 1.4),
    "grad_norm": ("train/grad_norm", 1.5),
    "update_ratio": ("train/update_ratio", 0.2),
    "valid_actions": ("rollout/valid_action_rate", 0.7),
    "searches": ("rollout/searches_per_question", 0.6),
    "tagged_queries": ("rollout/tagged_query_rate", 0.2),
    "environment_mass": ("distill/environment_mass_student", 6e-4),
    "teacher_environment_mass": ("distill/environment_mass_teacher", 0.06),
    "jsd": ("distill/jsd", 0.13),
    "answers": ("rollout/answered_rate", 0.6),
    "truncation": ("rollout/truncated_rate", 0.6),
    "length": ("rollout/policy_tokens", 65.0),
    "all_correct": ("rollout/all_correct_groups", 1.0),
    "all_incorrect": ("rollout/all_incorrect_groups", 1.0),
    "reward": ("rollout/reward", 0.3),
}
"""What sets off each rule, from HEALTHY."""


def healthy(steps: int, seed: int = 0) -> list[dict[str, float]]:
    """Steps of a run that fares well, 15 % of noise on each value."""
    draw = random.Random(seed)
    noisy = [{key: value * draw.uniform(0.85, 1.15) for key, value in HEALTHY.items()} for _ in range(steps)]
    return [{key: min(value, 1.0) if "rate" in key else value for key, value in values.items()} for values in noisy]


def planted(name: str, steps: int) -> list[dict[str, float]]:
    key, value = PLANTED[name]
    return [HEALTHY | {key: value}] * steps


def begun(health: TrainingHealth, series: Iterable[Mapping[str, float]]) -> list[tuple[int, str]]:
    """Index of the step and name of each alarm."""
    return [(step, name) for step, values in enumerate(series) for name in health.judge(values)]


# Rules


def test_every_rule_has_a_planted_series() -> None:
    assert set(PLANTED) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_after_its_patience_and_no_other_does(name: str) -> None:
    health, patience = TrainingHealth(), RULES[name].patience
    assert begun(health, [*healthy(12), *planted(name, patience - 1), *healthy(1)]) == []
    assert begun(health, planted(name, patience + 5)) == [(patience - 1, name)]
    assert [other for other, watch in health.watches.items() if watch.in_alarm] == [name]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_raises_no_alarm(seed: int) -> None:
    health = TrainingHealth()
    assert begun(health, healthy(200, seed)) == []
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
        for step, values in enumerate(healthy(40))
    ]
    assert begun(TrainingHealth(), steps) == []


def test_an_alarm_is_told_once_per_episode() -> None:
    health = TrainingHealth()
    bad, good = planted("kl", 2), healthy(1)
    # One good step is not the end of an episode, two (the patience) are.
    assert begun(health, [*bad, *good, *bad, *good * 2, *bad]) == [(1, "kl"), (8, "kl")]


def test_a_step_without_the_metric_leaves_its_rule_as_it_is() -> None:
    health = TrainingHealth()
    silent = {key: value for key, value in HEALTHY.items() if key != "train/kl"}
    assert begun(health, [*planted("kl", 1), silent, silent, *planted("kl", 1)]) == [(3, "kl")]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_alarm_of_its_own_and_enters_no_average(value: float) -> None:
    health = TrainingHealth()
    begun(health, healthy(10))
    before = health.watches["grad_norm"].average
    assert begun(health, [HEALTHY | {"train/grad_norm": value}]) == [(0, "not_finite")]
    assert health.watches["grad_norm"].average == before


def test_a_collapse_does_not_drag_its_own_bound_along() -> None:
    health = TrainingHealth()
    steps = [HEALTHY | {"train/grad_norm": 0.1 * 1.6**step} for step in range(40)]
    assert [name for _, name in begun(health, [*healthy(10), *steps])] == ["grad_norm"]
    assert health.watches["grad_norm"].in_alarm


def test_relative_rules_sleep_while_their_reference_is_noise() -> None:
    health = TrainingHealth()
    assert begun(health, [HEALTHY | {"rollout/reward": reward} for reward in (0.12, 0.1, 0.01, 0.0, 0.0)]) == []
    noise = [HEALTHY | {"train/grad_norm": norm} for norm in (1e-4, 1e-4, 5.0, 5.0)]
    assert len(noise) < SETTLE and begun(TrainingHealth(), noise) == []


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
        for name in health.judge(HEALTHY | masses_now):
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
    assert begun(health, [HEALTHY | {"train/kl": 1.9, "train/clip_fraction": 0.1}]) == []
    assert begun(health, [HEALTHY | {"train/kl": 2.1, "train/clip_fraction": 0.3}]) == [(0, "kl"), (0, "clipping")]
    assert begun(health, [*healthy(9), *planted("length", 9)]) == []
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
    page = read_page(PAGE.read_text())
    logged = page.keys | {f"rollout/{score}" for score in page.scores - {"questions"}}
    assert set(WATCHABLE) == {key for key in logged if key.split("/")[0] in ("rollout", "search", "train", "distill")}


def test_the_page_lists_the_rules() -> None:
    rows = re.findall(r"^\| (\w+) \| .*`([a-z]+/\w+)`.* \| (\d+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    assert rows == [(name, rule.metric, str(rule.patience)) for name, rule in RULES.items()]


# In a run


class Model(pl.LightningModule):
    """Logs a written series, a step each, and learns a little."""

    def __init__(self, series: Sequence[Mapping[str, float]]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight, self.series = torch.nn.Parameter(torch.zeros(1)), series
        self.rates: list[float] = []
        self.jsd_weight = 0.0
        self.jsd_weights: list[float] = []

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.jsd_weights.append(self.jsd_weight)
        self.manual_backward((self.weight - batch).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.log_dict(dict(self.series[self.trainer.global_step - 1]))


class Saving(pl.callbacks.Checkpoint):
    """Saves and publishes every step as a run does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkpoints"

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.folder / f"step_{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path)
        (self.folder / "last.ckpt").unlink(missing_ok=True)
        (self.folder / "last.ckpt").symlink_to(path.name)
        for old in sorted(self.folder.glob("step_*"))[:-2]:
            old.unlink()


class Rows(pl.Callback):
    """What each step logged, read after all others."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rows.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def run(model: Model, *callbacks: pl.Callback, folder: Path, ckpt_path: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=len(model.series),
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    )
    data = torch.utils.data.DataLoader(torch.ones(len(model.series)))  # a plain loader does not resume
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_a_healthy_run_is_the_same_run(tmp_path: Path) -> None:
    series = healthy(20)
    plain, watched, rows, more = Model(series), Model(series), Rows(), Rows()
    run(plain, rows, folder=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers")
        run(watched, TrainingHealth("stop"), more, folder=tmp_path)
    assert [row.pop("health/alerts") for row in more.rows] == [0.0] * 20
    assert more.rows == rows.rows and len(rows.rows) == 20
    assert watched.rates == plain.rates and torch.equal(watched.weight, plain.weight)


def test_a_warning_says_what_happened_and_what_to_try(tmp_path: Path) -> None:
    rows = Rows()
    line = (
        r"TrainingHealth, step 12, kl: train/kl is 1.4, above 1, for 2 steps: the policy is far from its start. "
        r"Try: lower the learning rate \(5e-7 for 3B\); raise model.kl_coef.$"
    )
    model = Model([*healthy(10), *planted("kl", 4), *healthy(3)])
    with pytest.warns(UserWarning, match=line) as caught:
        run(model, TrainingHealth(), rows, folder=tmp_path)
    assert sum("TrainingHealth" in str(warning.message) for warning in caught) == 1
    assert [row["health/alerts"] for row in rows.rows] == [0.0] * 11 + [1.0] * 4 + [0.0] * 2
    assert model.rates == pytest.approx([0.1 / (1 + step) for step in range(17)]), "a warning changes nothing"


@pytest.mark.filterwarnings("ignore:TrainingHealth")
def test_reduce_lowers_learning_rate_and_jsd_weight_from_the_next_step_on(tmp_path: Path) -> None:
    model = Model([*planted("kl", 2), *healthy(4), *planted("kl", 2), *healthy(1)])
    health = TrainingHealth("reduce", lr_factor=0.5, jsd_factor=0.25)
    with pytest.warns(UserWarning, match=r"kl: .* Reduced: learning rate 0.0167, jsd.weight 0.1\.$"):
        run(model, health, JSDWeightScheduler(0.4, warmup_steps=0), folder=tmp_path)
    factors = [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert model.rates == pytest.approx([0.1 * factor / (1 + step) for step, factor in enumerate(factors)])
    assert model.jsd_weights == pytest.approx([0.4 * factor**2 for factor in factors])


def test_stop_ends_the_run_after_the_step_and_names_the_best_checkpoint(tmp_path: Path) -> None:
    rising = [HEALTHY | {"rollout/reward": 0.3 + 0.02 * step} for step in range(10)]
    model = Model([*rising, *planted("teacher_environment_mass", 1), *healthy(9)])
    best = tmp_path / "checkpoints" / "best.ckpt"
    line = rf"step 11, teacher_environment_mass: .* Stopping. Best checkpoint: {best} \(step 10\)\.$"
    with pytest.warns(UserWarning, match=line):
        trainer = run(model, TrainingHealth("stop"), Saving(tmp_path), folder=tmp_path)
    assert trainer.global_step == 11
    assert torch.load(best, weights_only=True)["global_step"] == 10


def test_the_best_checkpoint_outlives_the_ones_after_it(tmp_path: Path) -> None:
    rewards = [0.3, 0.4, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    run(
        Model([HEALTHY | {"rollout/reward": reward} for reward in rewards]),
        TrainingHealth(),
        Saving(tmp_path),
        folder=tmp_path,
    )
    # Means of up to five steps: .3, .35, .4, .4125, .41, ...
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 4
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2


def test_without_a_checkpoint_the_line_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Stopping. No checkpoint was saved while all was well"):
        assert run(Model(planted("kl", 5)), TrainingHealth("stop"), folder=tmp_path).global_step == 2


@pytest.mark.filterwarnings("ignore:TrainingHealth")
@pytest.mark.parametrize("killed_at", [3, 5, 6, 8, 9])
def test_a_run_resumed_in_mid_episode_goes_on_exactly(tmp_path: Path, killed_at: int) -> None:
    """Patience of 2: steps 5 to 8 are out of bounds, the alarm lasts from 6 to 10; then another one."""
    series = [*healthy(4), *planted("kl", 4), *healthy(3), *planted("kl", 2), *healthy(2)]
    whole, rows = Model(series), Rows()
    health = TrainingHealth("reduce", jsd_factor=0.3)
    run(whole, health, JSDWeightScheduler(0.7, 0), rows, Saving(tmp_path / "whole"), folder=tmp_path / "whole")

    class Kill(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == killed_at:
                raise KeyboardInterrupt

    folder = tmp_path / "killed"
    with pytest.raises(SystemExit):
        run(Model(series), TrainingHealth("reduce", jsd_factor=0.3), JSDWeightScheduler(0.7, 0), Saving(folder), Kill(),
            folder=folder)  # fmt: skip
    resumed, after, again = Model(series), Rows(), TrainingHealth("reduce", jsd_factor=0.3)
    last = folder / "checkpoints" / "last.ckpt"
    run(resumed, again, JSDWeightScheduler(0.7, 0), after, Saving(folder), folder=folder, ckpt_path=last)
    assert after.rows == rows.rows[killed_at:]
    assert (resumed.rates, resumed.jsd_weights) == (whole.rates[killed_at:], whole.jsd_weights[killed_at:])
    assert again.state_dict() == health.state_dict() and health.watches["kl"].seen == 9
    assert torch.equal(resumed.weight, whole.weight)


def test_two_ranks_judge_the_mean_whatever_each_of_them_logged() -> None:
    """Both reduce in every step, also one that has no value; only then can they stop together."""
    seen = {"train/kl": (0.2, 2.2), "distill/jsd": (None, 0.1), "rollout/reward": (0.4, math.nan)}
    health = TrainingHealth()
    tables = []

    class Strategy:
        root_device = torch.device("cpu")
        answer: torch.Tensor | None = None

        def reduce(self, table: torch.Tensor, reduce_op: str) -> torch.Tensor:
            assert reduce_op == "sum"
            tables.append(table)
            return table if self.answer is None else self.answer

    def values(rank: int, answer: torch.Tensor | None) -> dict[str, float]:
        strategy = Strategy()
        strategy.answer = answer
        logged = {key: torch.tensor(pair[rank]) for key, pair in seen.items() if pair[rank] is not None}
        results: Any = type("Results", (), {"metrics": lambda self, on_step: {"callback": logged}})()
        trainer: Any = type("T", (), {"world_size": 2, "strategy": strategy})()
        trainer.fit_loop = type("L", (), {"_results": results})()
        return health._values(trainer)

    for rank in range(2):
        values(rank, None)
    first, second = (values(rank, tables[0] + tables[1]) for rank in range(2))
    assert str(first) == str(second)
    assert first["train/kl"] == pytest.approx(1.2) and first["distill/jsd"] == pytest.approx(0.1)
    assert math.isnan(first["rollout/reward"]) and "train/entropy" not in first
