"""`supervise`: the command of a cold start, which learns demonstrations and makes no rollouts."""

from __future__ import annotations

from typing import Any

from sdsearch_lightning.checkpoints.writing import by_rank_0
from sdsearch_lightning.cli.common import say
from sdsearch_lightning.cli.training import TRAINER_DEFAULTS, RunCLI
from sdsearch_lightning.report.console import duration
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.report.summary import build_summary, read_summary, write_summary
from sdsearch_lightning.supervised import SupervisedModule


class SuperviseCLI(RunCLI):
    """`supervise`: SupervisedModule, without rollouts."""

    module_class = SupervisedModule
    training = "supervise"
    defaults = TRAINER_DEFAULTS | {"limit_val_batches": 0}  # a cold start has no rollouts to evaluate

    def supervise(self, **kwargs: Any) -> None:
        """Trains, saves the model and writes a summary."""
        self.train(**kwargs)
        if self.is_training_run:
            self.save_model()
            by_rank_0(self.trainer, self._finish)

    def _finish(self) -> None:
        # A run shorter than trainer.log_every_n_steps logs nothing.
        metrics = read_metrics(self.folder.path) if self.folder.metrics.is_file() else {}
        losses = [point.value for point in metrics.get("train/loss", [])]
        loss = {"first": losses[0], "last": losses[-1]} if losses else None
        facts = self.facts | {"steps": self.trainer.global_step, "train_loss": loss}
        write_summary(self.folder.path, build_summary(metrics, facts))
        self.report()

    def report(self) -> None:
        summary = read_summary(self.folder.path) or {}
        loss = summary["train_loss"]
        told = f", train/loss {loss['first']:.3f} -> {loss['last']:.3f}" if loss else ""
        say(f"cold start: {summary['steps']} steps in {duration(summary['seconds'])}, seed {summary['seed']}{told}")
        say(f"the model is in {self.folder.model}")
