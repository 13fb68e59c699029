"""The commands with a trainer: LightningCLI with named groups, one seed, a run folder and short errors.

Every key is a keyword argument of some class: `model:` the module, `data:` a data module, `rollout:`, `hindsight:`,
`jsd:` and `credit:` the callbacks of the method, `run:` RunOptions, `trainer:` Lightning's Trainer. What Lightning must
be told for this library to work is told here, once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from sdsearch_lightning.callbacks import (
    CreditWeightScheduler,
    GracefulStop,
    HindsightConstruction,
    JSDWeightScheduler,
    RolloutGrouping,
    TrajectoryLog,
)
from sdsearch_lightning.callbacks.run_checkpoint import RunCheckpoint, StepBoundary
from sdsearch_lightning.callbacks.run_progress import RunProgress
from sdsearch_lightning.callbacks.run_start import QuestionsFirst, RunStart
from sdsearch_lightning.checkpoints.writing import PlainFiles, by_rank_0
from sdsearch_lightning.cli.common import say, shared_config
from sdsearch_lightning.cli.evaluation import EvaluationCommands, weights_name
from sdsearch_lightning.cli.processes import ending_together, watch_processes
from sdsearch_lightning.cli.resume import explaining_loads, find_checkpoint
from sdsearch_lightning.cli.run_parser import RunParser, parser_settings, read_field_texts
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.files import remove, write_text
from sdsearch_lightning.inference.building import link_seed
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.report import finish_run, print_report
from sdsearch_lightning.report.trajectories import cut_after
from sdsearch_lightning.runs.folder import RunFolder, RunOptions, warn
from sdsearch_lightning.runs.lock import held_alone
from sdsearch_lightning.runs.metrics_logger import MetricsLogger
from sdsearch_lightning.runs.model_card import write_model
from sdsearch_lightning.runs.threads import use_threads
from sdsearch_lightning.training.fsdp2 import check_strategy
from sdsearch_lightning.training.options import ADAMW

METHOD = RolloutGrouping, HindsightConstruction, JSDWeightScheduler, CreditWeightScheduler  # in the order they run in
TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the data module deals questions out to ranks itself, resumably
    "num_sanity_val_steps": 0,  # a sanity pass is a full rollout; `fit` validates at step 0 instead
    "inference_mode": False,  # key-value buffers made in inference mode could not be written in training
    "log_every_n_steps": 1,  # a step is a whole rollout batch
    "enable_model_summary": False,  # one row and eight lines of totals
}


class SearchTrainer(pl.Trainer):
    """Lightning's Trainer, with `supervise` as a second name of `fit`: a command is a method of the trainer."""

    supervise = pl.Trainer.fit


class RunCLI(LightningCLI):
    """What the commands with a trainer share. Making one runs the command."""

    module_class: type[pl.LightningModule]
    training: str
    """The command that trains, and so owns the run folder."""
    defaults: dict[str, Any] = TRAINER_DEFAULTS

    def __init__(self, argv: Sequence[str]) -> None:
        self._command = argv[0]
        read_field_texts(argv)
        with ExitStack() as self.holds:
            super().__init__(
                self.module_class,
                SearchDataModule,
                trainer_class=SearchTrainer,
                trainer_defaults=self.defaults,
                seed_everything_default=0,  # a fixed one, or a run could not be resumed by the same command
                parser_kwargs=parser_settings(self.subcommands()),
                parser_class=RunParser,
                subclass_mode_data=True,
                args=list(argv),
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning calls it on the object
        """The given command alone: a parser for each of the four would be made for nothing."""
        skipped = LightningCLI.subcommands()
        return {self._command: skipped["fit" if self._command == self.training else self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        link_seed(parser)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # our checkpoints hold tensors and plain values only
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        command = self.config[self.config.subcommand]
        files = [yaml.safe_load(Path(str(path)).read_text(encoding="utf-8")) or {} for path in command.config or ()]
        data = [file["data"] for file in files if isinstance(file.get("data"), dict)]
        given = [key for group in data for key in (*group, *(group.get("init_args") or ()))]
        if "seed" in given or any(re.match(r"--data\.(init_args\.)?seed\b", argument) for argument in args):
            # jsonargparse says so for other linked keys, but overrules this one without a word.
            parser.error('Linked "data.seed" must be given via "seed_everything".')

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the checkpoint's hyperparameters overrule the configuration, silently."""

    @property
    def options(self) -> Any:
        """The parsed keys of the command."""
        return self.config[self.subcommand]

    @property
    def is_training_run(self) -> bool:
        """Whether this command trains and keeps what it does; `trainer.fast_dev_run` keeps nothing."""
        return self.subcommand == self.training and not self.options.trainer.fast_dev_run

    def before_instantiate_classes(self) -> None:
        run = RunOptions(**vars(self.options.run))
        use_threads(run.num_threads)
        self.folder = RunFolder(Path(run.root) / run.name)
        self.checkpoint = RunCheckpoint(self.folder.checkpoints, run)
        self.stop = GracefulStop(self.checkpoint.request, "The same command goes on from there.")
        self.resumed_step: int | None = None
        self.save_config_callback = None  # `take_folder` saves it
        check_strategy(self.options.trainer.strategy)
        if self.is_training_run:
            self.holds.enter_context(held_alone(self.folder.path))
        command = str(self.subcommand)
        self.given = find_checkpoint(command, self.options, self.folder, is_evaluation=command != self.training)
        if self.is_training_run and not run.overwrite:
            self._look_into_folder()
        path = self.folder.path
        if not self.is_training_run:
            path = path / command / weights_name(self.options, self.given, self.folder)
        self.metrics = MetricsLogger(path / "metrics.csv")

    def _look_into_folder(self) -> None:
        """Reports a finished run, prepares to resume one that is under way, refuses another one."""
        self.folder.check_owner(shared_config(self._parser(self.subcommand), self.options))
        if self.folder.is_finished:
            say(f"{self.folder.path} holds this run, finished; --run.overwrite true would do it again.")
            rank_zero_only(self.report)()
            raise SystemExit(0)
        if (point := self.folder.resume_point()) is not None:
            path, self.resumed_step = point
            self.options.ckpt_path, self.given = str(path), None

    def after_instantiate_classes(self) -> None:
        if self.resumed_step is not None:
            say(f"resuming {self.folder.path} after step {self.resumed_step}")

    def _run_subcommand(self, subcommand: str) -> None:
        with ending_together(self.trainer), explaining_loads(self.trainer, self.options.ckpt_path):
            super()._run_subcommand(subcommand)

    def take_folder(self) -> None:
        """Makes room for what the command writes, now that nothing can prove wrong any more; on rank 0."""
        if not self.is_training_run:
            self.holds.enter_context(held_alone(self.metrics.path.parent))
            remove(self.metrics.path.parent)
        elif self.resumed_step is None:
            self.folder.clear()
            self.folder.path.mkdir(parents=True, exist_ok=True)
            config = shared_config(self._parser(self.subcommand), self.options)
            write_text(self.folder.config, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            for logger in self.trainer.loggers:
                logger.log_hyperparams(config)
        else:
            self.folder.clear_after(self.resumed_step, self.checkpoint.options)
            callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            every = next(
                (log.every_n_steps for log in callbacks if isinstance(log, TrajectoryLog) and not log.path), None
            )
            rollouts = self.folder.path / "trajectories.jsonl"
            lost = self.metrics.cut_after(self.resumed_step)
            for line in lost + cut_after(rollouts, self.resumed_step, every):
                warn(line)

    def own_callbacks(self) -> list[pl.Callback]:
        """Callbacks that need no configuration; one of the same class in `trainer.callbacks` takes its place."""
        return [RunStart(self.take_folder, self.given, self.resumed_step), StepBoundary(self.checkpoint), self.stop]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand].trainer
        listed, loggers = _as_list(config.callbacks), _as_list(config.logger)
        own = [] if config.fast_dev_run else self.own_callbacks()  # they write
        if self.is_training_run and config.enable_checkpointing is not False:
            own.append(self.checkpoint)
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in listed):
            own.append(RunProgress())
        replaced = {type(callback) for callback in listed}
        kwargs["callbacks"] = [*(callback for callback in own if type(callback) not in replaced), *listed]
        if type(config.val_check_interval) is int and config.check_val_every_n_epoch == 1:
            kwargs["check_val_every_n_epoch"] = None  # so many steps, also where an epoch has fewer
        kwargs["default_root_dir"] = self.metrics.save_dir
        plugins = _as_list(config.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, PlainFiles()]
        if False not in loggers:
            kwargs["logger"] = [self.metrics, *(logger for logger in loggers if logger is not True)]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(f"trainer: {error}") from error
        self.metrics.trainer = trainer
        watch_processes(trainer, lambda: self.folder.way_on if self.is_training_run else "Run the same command again.")
        return trainer

    def train(self, **kwargs: Any) -> None:
        """Fits, and leaves where a signal came during the last step."""
        self.trainer.fit(**kwargs)
        if self.stop.is_stopping:
            self.stop.leave(self.trainer.global_step)

    def save_model(self) -> None:
        """Writes the trained model into the run folder; all ranks call it."""
        save = partial(self.model.save_pretrained, weights=self.model.whole_weights())
        by_rank_0(self.trainer, lambda: write_model(self.folder, save, self.trainer.global_step, self.facts))

    def report(self) -> None:
        """Tells the result of a finished run."""
        print_report(self.folder.path)

    @property
    def facts(self) -> dict[str, Any]:
        """What a summary tells beside the metrics."""
        return {"seconds": round(self.checkpoint.seconds, 1), "seed": self.options.seed_everything}


class SearchCLI(EvaluationCommands, RunCLI):
    """`fit`, `validate`, `test` and `predict` of SDSearchModule, with the method's callbacks as named groups."""

    module_class = SDSearchModule
    training = "fit"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        for name, callback in zip(("rollout", "hindsight", "jsd", "credit"), METHOD, strict=True):
            parser.add_lightning_class_args(callback, name)
        parser.set_defaults({"model.optimizer": ADAMW})  # of `adamw`, whose options could not be set one by one
        parser.link_arguments("seed_everything", "rollout.seed", int)
        parser.link_arguments("rollout.temperature", "model.temperature")

    def own_callbacks(self) -> list[pl.Callback]:
        first = [QuestionsFirst()] if self.is_training_run else []
        return [*first, *super().own_callbacks(), TrajectoryLog(), *self.evaluation_callbacks()]

    @property
    def facts(self) -> dict[str, Any]:
        return super().facts | {"max_searches": self.options.rollout.max_searches}

    def fit(self, **kwargs: Any) -> None:
        """Evaluates, trains, evaluates, saves the model and reports."""
        if not self.is_training_run:
            self.train(**kwargs)
            return
        if kwargs["ckpt_path"] is None:
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.train(**kwargs)
        is_validated = self.metrics.has("val/", self.trainer.global_step)
        if not self.trainer.strategy.broadcast(is_validated):
            self.trainer.validate(self.model, self.datamodule, verbose=False)
        self.save_model()
        by_rank_0(self.trainer, lambda: finish_run(self.folder.path, self.facts))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
