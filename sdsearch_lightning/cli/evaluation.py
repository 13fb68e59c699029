"""`validate`, `test` and `predict`: which weights, where the result goes, and the table at the end.

Each checkpoint's evaluation has a folder of its own, `runs/<name>/<command>/<weights>/`, which the next one of the same
weights replaces.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import lightning.pytorch as pl

from sdsearch_lightning.callbacks.evaluation_report import EvaluationReport
from sdsearch_lightning.callbacks.predictions import PredictionLog
from sdsearch_lightning.checkpoints.reading import StoredCheckpoint
from sdsearch_lightning.cli.common import say
from sdsearch_lightning.report.console import make_console
from sdsearch_lightning.report.evaluation import TABLE, print_evaluation
from sdsearch_lightning.report.example import harmless
from sdsearch_lightning.runs.folder import RunFolder
from sdsearch_lightning.runs.model_card import without_machine_paths


def weights_name(options: Any, given: StoredCheckpoint | None, folder: RunFolder) -> str:
    """A folder name for the weights of an evaluation: the step of a checkpoint of the run, else the model's own name.

    Args:
        options: parsed keys of the command.
        given: the checkpoint that was named.
        folder: of the run.
    """
    if given is not None:
        name, owner = f"step_{given.step:08d}", given.path.resolve().parent.parent
        return name if owner == folder.path.resolve() else f"{_slug(owner.name)}-{name}"
    return _slug(str(without_machine_paths(options.model.model_name_or_path or "scratch")))


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[-100:] or "model"


class EvaluationCommands:
    """The commands of `SearchCLI` that evaluate."""

    options: Any
    subcommand: Any
    trainer: Any
    folder: RunFolder
    given: StoredCheckpoint | None

    def evaluation_callbacks(self) -> list[pl.Callback]:
        """What writes the result of this command."""
        by_command = {"predict": self.predictions, "validate": self.evaluation, "test": self.evaluation}
        return [by_command[self.subcommand]] if self.subcommand in by_command else []

    @cached_property
    def predictions(self) -> PredictionLog:
        """What writes the result of `predict`."""
        return PredictionLog()

    @cached_property
    def evaluation(self) -> EvaluationReport:
        """What writes the result of `validate` and `test`."""
        rollout, data = self.options.rollout, self.options.data.get("init_args") or {}
        protocol = self.options.model.protocol
        facts = {
            "command": str(self.subcommand),
            "run": self.options.run.name,
            "weights": weights_name(self.options, self.given, self.folder),
            "model": without_machine_paths(self.options.model.model_name_or_path),
            "decoding": {"greedy": True}
            | {name: rollout[name] for name in ("max_searches", "top_k", "max_turn_tokens", "max_tokens")},
            "protocol": protocol if isinstance(protocol, str) else protocol.class_path.rpartition(".")[2],
            "seed": self.options.seed_everything,
            "limit": data.get("limit"),
            "limit_per_source": data.get("limit_per_source"),
        }
        return EvaluationReport(facts)

    def predict(self, **kwargs: Any) -> None:
        """Answers, and tells where the answers are."""
        self.trainer.predict(**kwargs | {"return_predictions": False})  # they are in a file
        if not self.options.trainer.fast_dev_run:
            say(f"a line for each question: {harmless(str(self.predictions.file(self.trainer)))}")

    def validate(self, **kwargs: Any) -> None:
        """Evaluates the validation questions, and prints one table."""
        self._evaluate(self.trainer.validate, kwargs)

    def test(self, **kwargs: Any) -> None:
        """Evaluates the test questions, and prints one table."""
        self._evaluate(self.trainer.test, kwargs)

    def _evaluate(self, run: Any, kwargs: dict[str, Any]) -> None:
        is_kept = not self.options.trainer.fast_dev_run
        run(**kwargs | {"verbose": kwargs["verbose"] and not is_kept})
        if is_kept and self.evaluation.result is not None:
            console = make_console()
            print_evaluation(console, self.evaluation.result)
            folder = self.evaluation.folder or self.trainer.default_root_dir
            console.print(harmless(f"{folder}/{TABLE}"), markup=False, soft_wrap=True)
