"""What an alarm does in a run, and that nothing else changes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.health import HEALTHY_METRICS, healthy_series, planted_series
from sdsearch_lightning.callbacks import JSDWeightScheduler, TrainingHealth

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You're resuming from")


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
    series = healthy_series(20)
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
    model = Model([*healthy_series(10), *planted_series("kl", 4), *healthy_series(3)])
    with pytest.warns(UserWarning, match=line) as caught:
        run(model, TrainingHealth(), rows, folder=tmp_path)
    assert sum("TrainingHealth" in str(warning.message) for warning in caught) == 1
    assert [row["health/alerts"] for row in rows.rows] == [0.0] * 11 + [1.0] * 4 + [0.0] * 2
    assert model.rates == pytest.approx([0.1 / (1 + step) for step in range(17)]), "a warning changes nothing"


@pytest.mark.filterwarnings("ignore:TrainingHealth")
def test_reduce_lowers_learning_rate_and_jsd_weight_from_the_next_step_on(tmp_path: Path) -> None:
    model = Model([*planted_series("kl", 2), *healthy_series(4), *planted_series("kl", 2), *healthy_series(1)])
    health = TrainingHealth("reduce", lr_factor=0.5, jsd_factor=0.25)
    with pytest.warns(UserWarning, match=r"kl: .* Reduced: learning rate 0.0167, jsd.weight 0.1\.$"):
        run(model, health, JSDWeightScheduler(0.4, warmup_steps=0), folder=tmp_path)
    factors = [1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert model.rates == pytest.approx([0.1 * factor / (1 + step) for step, factor in enumerate(factors)])
    assert model.jsd_weights == pytest.approx([0.4 * factor**2 for factor in factors])


def test_stop_ends_the_run_after_the_step_and_names_the_best_checkpoint(tmp_path: Path) -> None:
    rising = [HEALTHY_METRICS | {"rollout/reward": 0.3 + 0.02 * step} for step in range(10)]
    model = Model([*rising, *planted_series("teacher_environment_mass", 1), *healthy_series(9)])
    best = tmp_path / "checkpoints" / "best.ckpt"
    line = rf"step 11, teacher_environment_mass: .* Stopping. Best checkpoint: {best} \(step 10\)\.$"
    with pytest.warns(UserWarning, match=line):
        trainer = run(model, TrainingHealth("stop"), Saving(tmp_path), folder=tmp_path)
    assert trainer.global_step == 11
    assert torch.load(best, weights_only=True)["global_step"] == 10


def test_the_best_checkpoint_outlives_the_ones_after_it(tmp_path: Path) -> None:
    rewards = [0.3, 0.4, 0.5, 0.45, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    run(
        Model([HEALTHY_METRICS | {"rollout/reward": reward} for reward in rewards]),
        TrainingHealth(),
        Saving(tmp_path),
        folder=tmp_path,
    )
    # Means of up to five steps: .3, .35, .4, .4125, .41, ...
    assert torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] == 4
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 2


def test_without_a_checkpoint_the_line_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Stopping. No checkpoint was saved while all was well"):
        assert run(Model(planted_series("kl", 5)), TrainingHealth("stop"), folder=tmp_path).global_step == 2


@pytest.mark.filterwarnings("ignore:TrainingHealth")
@pytest.mark.parametrize("killed_at", [3, 5, 6, 8, 9])
def test_a_run_resumed_in_mid_episode_goes_on_exactly(tmp_path: Path, killed_at: int) -> None:
    """Patience of 2: steps 5 to 8 are out of bounds, the alarm lasts from 6 to 10; then another one."""
    series = [
        *healthy_series(4),
        *planted_series("kl", 4),
        *healthy_series(3),
        *planted_series("kl", 2),
        *healthy_series(2),
    ]
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
