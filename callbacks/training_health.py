"""TrainingHealth: sees a collapse coming in what each step logs anyway, and says so, slows down or stops.

Invariant: a healthy run with it and one without it are the same run. It reads numbers, draws none, and touches learning
rates and weights of losses only where a rule whose action is `reduce` raises its alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn

from sdsearch_lightning.callbacks.health_defaults import RULES
from sdsearch_lightning.callbacks.health_rules import Action, Watch, make_rules
from sdsearch_lightning.callbacks.jsd_weight_scheduler import JSDWeightScheduler
from sdsearch_lightning.checkpoints.writing import name_again
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.training.policy_module import PolicyModule

SCORE = "rollout/reward"
"""The best checkpoint is the one with the highest average of it over recent steps."""
ALWAYS = (SCORE, "train/loss", "train/grad_norm", "train/skipped_updates")
"""Read in any case: for the best checkpoint, and for values that are not finite."""
ENVIRONMENT_MASSES = ("distill/environment_mass_student", "distill/environment_mass_teacher")
"""Left out where the documents tag is several tokens."""


class TrainingHealth(pl.Callback):
    """Judges every training step by named rules (`health_defaults.RULES`) and logs `health/alerts`.

    A rule raises its alarm once per episode: after `patience` steps out of bounds, until as many within them. A metric
    that a step does not log leaves its rules as they are. All ranks judge the means over ranks, so they act together.

    While no rule sees anything out of bounds, the published checkpoint with the best reward is kept as
    `checkpoints/best.ckpt`, a second name of a file that the run saves anyway. It is no part of resuming: export it, or
    train on from it.

    Args:
        action: what an alarm does. `warn` says what happened and what to try. `reduce` also multiplies learning rates
            and JSD weight by the two factors, for good. `stop` ends the run after this step; the best checkpoint stays.
        rules: changes by name of the rule: fields to replace (`kl: {bound: 2, action: stop}`), null to switch it off; a
            new name with metric, how and bound is a new rule.
        lr_factor: of `reduce`, on every learning rate; 1 leaves it alone.
        jsd_factor: of `reduce`, on `jsd.weight`; 1 leaves it alone.
        keep_best: whether to keep `best.ckpt`.
    """

    def __init__(
        self,
        action: Action = "warn",
        rules: dict[str, dict[str, Any] | None] | None = None,
        lr_factor: float = 0.5,
        jsd_factor: float = 0.5,
        keep_best: bool = True,
    ) -> None:
        super().__init__()
        if action not in get_args(Action):
            raise ConfigError(
                f"TrainingHealth.action: found {action!r}, expected one of {', '.join(get_args(Action))}."
            )
        for name, factor in (("lr_factor", lr_factor), ("jsd_factor", jsd_factor)):
            if not 0 <= factor <= 1:
                raise ConfigError(f"TrainingHealth.{name}: expected a factor from 0 to 1, found {factor}.")
        self.action, self.rules = action, make_rules(RULES, rules or {})
        self.lr_factor, self.jsd_factor, self.keep_best = lr_factor, jsd_factor, keep_best
        self.watches = {name: Watch() for name in self.rules}
        self._names = sorted({rule.metric for rule in self.rules.values()} | set(ALWAYS))
        self._score = Watch()
        self._best: tuple[float, int] | None = None
        """Score and step of best.ckpt."""
        self._jsd_left = 1.0
        """What `reduce` has left of the JSD weight."""
        self._jsd_owner: Any = None
        self._jsd_weight = 0.0
        """Of the owner, as configured."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find who sets the JSD weight; a resumed run goes on with the weight that was left."""
        owners = [c for c in trainer.callbacks if isinstance(c, JSDWeightScheduler)]  # type: ignore[attr-defined]
        if owners and owners[0] is not self._jsd_owner:
            self._jsd_owner, self._jsd_weight = owners[0], owners[0].weight
        self._set_jsd_weight()
        ids = getattr(pl_module, "environment_ids", None)
        blind = [name for name, rule in self.rules.items() if rule.metric in ENVIRONMENT_MASSES]
        if ids is not None and not len(ids) and blind:
            rank_zero_warn(
                f"TrainingHealth: {' and '.join(blind)} see nothing here: with this tokenizer the documents tag is "
                "several tokens, and their metrics are left out. tagged_queries still watches the queries themselves."
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the checkpoint that was published just before, if it is the best."""
        self._keep_best(trainer)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the validation after the last step, which no further step would come to."""
        self._keep_best(trainer)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: PolicyModule,  # type: ignore[override]
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Judge what the step logged."""
        values = self._values(trainer)
        for name in self.judge(values):
            self._act(trainer, pl_module, name, values)
        alerts = float(sum(watch.in_alarm for watch in self.watches.values()))
        pl_module.log("health/alerts", alerts, batch_size=1)

    def judge(self, values: Mapping[str, float]) -> list[str]:
        """Take in the metrics of a step; names of the rules whose alarm begins with it."""
        broken = values.get("train/skipped_updates", 0.0) + sum(not math.isfinite(v) for v in values.values())
        begun = []
        for name, rule in self.rules.items():
            value = broken if rule.how == "not_finite" else values.get(rule.metric)
            if value is not None and math.isfinite(value) and self.watches[name].judge(rule, value):
                begun.append(name)
        if math.isfinite(score := values.get(SCORE, math.nan)):
            self._score.take(score)
        return begun

    def _values(self, trainer: pl.Trainer) -> dict[str, float]:
        """What this step logged, of the metrics that rules watch: means over the ranks that have them.

        Not `trainer.callback_metrics`, which repeats the values of earlier steps.
        """
        assert trainer.fit_loop._results is not None
        logged = trainer.fit_loop._results.metrics(on_step=True)["callback"]
        values = {name: float(logged[name]) for name in self._names if name in logged}
        if trainer.world_size > 1:
            # Every rank, every step, whatever it has: who judged its own values could act alone, and all would hang.
            table = torch.tensor(
                [[values.get(name, 0.0), float(name in values)] for name in self._names],
                dtype=torch.float64,
                device=trainer.strategy.root_device,
            )
            sums: Any = trainer.strategy.reduce(table, reduce_op="sum")
            rows = zip(self._names, sums.tolist(), strict=True)
            values = {name: total / count for name, (total, count) in rows if count}
        return values

    def _act(self, trainer: pl.Trainer, module: pl.LightningModule, name: str, values: Mapping[str, float]) -> None:
        """What the rule's action asks for, and the line that says so."""
        rule = self.rules[name]
        action = rule.action or self.action
        if action == "reduce":
            done = self._reduce(trainer, module)
        elif action == "stop":
            trainer.should_stop = True
            done = f" Stopping. {self._kept(trainer)}"
        else:
            done = ""
        found = self._told(name, values)
        rank_zero_warn(
            f"TrainingHealth, step {trainer.global_step}, {name}: {found}: {rule.meaning}. Try: {rule.advice}.{done}"
        )

    def _told(self, name: str, values: Mapping[str, float]) -> str:
        """One alarm in words: the value, and the bound it went beyond."""
        rule, watch = self.rules[name], self.watches[name]
        if rule.how == "not_finite":
            bad = [key for key, value in values.items() if not math.isfinite(value)]
            skipped = values.get("train/skipped_updates", 0.0)
            return ", ".join([*(f"{key} is {values[key]}" for key in bad), f"{skipped:g} updates skipped"])
        side, _, reference = rule.how.partition("_")
        relative = (
            f" ({rule.bound:g} x the {'best' if reference == 'best' else 'running'} average)" if reference else ""
        )
        return (
            f"{rule.metric} is {values[rule.metric]:.4g}, {side} {watch.limit(rule):.4g}{relative}, "
            f"for {watch.steps_out} step{'s' * (watch.steps_out > 1)}"
        )

    def _reduce(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        """Multiply learning rates and JSD weight by their factors."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for key in ("lr", "initial_lr"):
                    if key in group:
                        group[key] *= self.lr_factor
        for config in trainer.lr_scheduler_configs:
            # A schedule multiplies its base rates, which its checkpoint holds.
            if (rates := getattr(config.scheduler, "base_lrs", None)) is not None:
                config.scheduler.base_lrs = [rate * self.lr_factor for rate in rates]
        self._jsd_left *= self.jsd_factor
        self._set_jsd_weight()
        now = ", ".join(f"{group['lr']:.3g}" for o in trainer.optimizers for group in o.param_groups)
        jsd = "" if self._jsd_owner is None else f", jsd.weight {self._jsd_owner.weight:.3g}"
        return f" Reduced: learning rate {now}{jsd}."

    def _set_jsd_weight(self) -> None:
        if self._jsd_owner is not None:
            self._jsd_owner.weight = self._jsd_weight * self._jsd_left

    def _keep_best(self, trainer: pl.Trainer) -> None:
        """Name this step's checkpoint `best.ckpt`, where nothing is wrong and the reward was never better."""
        last = _folder(trainer) / "last.ckpt"
        score, step = self._score.recent, trainer.global_step
        is_healthy = not any(watch.in_alarm or watch.steps_out for watch in self.watches.values())
        is_better = self._best is None or score > self._best[0]
        if not (self.keep_best and self._score.seen and is_healthy and is_better):
            return
        if not last.is_symlink() or last.readlink().name != f"step_{step:08d}.ckpt" or not last.exists():
            return
        self._best = score, step
        if trainer.is_global_zero:
            name_again(last, last.with_name("best.ckpt"))

    def _kept(self, trainer: pl.Trainer) -> str:
        """The path of the checkpoint that scored best so far, for the message of a stop."""
        if self._best is not None:
            return f"Best checkpoint: {_folder(trainer) / 'best.ckpt'} (step {self._best[1]})."
        for callback in trainer.checkpoint_callbacks:
            if path := getattr(callback, "best_model_path", ""):
                return f"Best checkpoint: {path}."
        return "No checkpoint was saved while all was well; save more often (run.checkpoint_every)."

    def state_dict(self) -> dict[str, Any]:
        """All that the rules remember of past values, so that a resumed run judges alike."""
        return {
            "watches": {name: asdict(watch) for name, watch in self.watches.items()},
            "score": asdict(self._score),
            "best": self._best,
            "jsd_left": self._jsd_left,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly there; a rule that is new starts now."""
        self.watches |= {name: Watch(**kept) for name, kept in state_dict["watches"].items() if name in self.watches}
        self._score = Watch(**state_dict["score"])
        self._best = None if state_dict["best"] is None else tuple(state_dict["best"])
        self._jsd_left = state_dict["jsd_left"]


def _folder(trainer: pl.Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
