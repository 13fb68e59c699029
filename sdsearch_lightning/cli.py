"""The commands behind `python -m sdsearch_lightning`: LightningCLI with named groups, run folders and short errors.

Every key is a keyword argument of some class: `model:` the module, `data:` a data module, `rollout:`, `hindsight:` and
`jsd:` the callbacks of the method, `run:` RunOptions, `trainer:` Lightning's Trainer. What Lightning must be told for
this library to work is told here, once. Next: run_folder.py and run_record.py.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import transformers
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sdsearch_lightning.callbacks import (
    GracefulStop,
    HindsightConstruction,
    JSDWeightScheduler,
    RolloutGrouping,
    TrajectoryLog,
)
from sdsearch_lightning.cli_errors import ShortErrorParser, fail
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.report import finish_run, print_report
from sdsearch_lightning.report.console import duration
from sdsearch_lightning.report.metrics import read_metrics
from sdsearch_lightning.report.summary import build_summary, read_summary, write_summary
from sdsearch_lightning.run_folder import RunFolder, RunOptions
from sdsearch_lightning.run_record import MetricsLogger, PublishCheckpoint, RunCheckpoint
from sdsearch_lightning.supervised import SupervisedModule

TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,  # the data module deals questions out to ranks itself, resumably
    "num_sanity_val_steps": 0,  # a sanity pass is a full rollout; `fit` validates at step 0 instead
    "inference_mode": False,  # key-value buffers made in inference mode could not be written in training
    "log_every_n_steps": 1,  # a step is a whole rollout batch
}


class SearchTrainer(pl.Trainer):
    """Lightning's Trainer, with `supervise` as a second name of `fit`: a command is a method of the trainer."""

    supervise = pl.Trainer.fit


class RunCLI(LightningCLI):
    """What all commands with a trainer share: the groups `run:` and `data:`, the seed, the run folder."""

    module_class: type[pl.LightningModule]
    training: str
    """The command that trains, and so owns the run folder."""
    defaults: dict[str, Any] = TRAINER_DEFAULTS

    def __init__(self, argv: Sequence[str]) -> None:
        parsers = {command: {"allow_abbrev": False} for command in self.subcommands()}
        super().__init__(
            self.module_class,
            SearchDataModule,
            save_config_kwargs={"overwrite": True},
            trainer_class=SearchTrainer,
            trainer_defaults=self.defaults,
            seed_everything_default=0,  # a fixed one, or a run could not be resumed by the same command
            parser_kwargs={"prog": "sdsearch", "allow_abbrev": False, **parsers},
            parser_class=ShortErrorParser,
            subclass_mode_data=True,
            args=list(argv),
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would let the checkpoint's hyperparameters overrule the configuration, silently."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        link_seed(parser, self.module_class)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # our checkpoints hold tensors and plain values only
        return parser

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
        self.folder = RunFolder(Path(run.root) / run.name)
        self.checkpoint = RunCheckpoint(self.folder.checkpoints, run.checkpoint_every)
        self.stop = GracefulStop(self.checkpoint.request, "The same command goes on from there.")
        check_strategy(self.options.trainer.strategy)
        if self.is_training_run:
            self.metrics = MetricsLogger(self.folder.metrics)
            self._claim_folder(run.overwrite)
        else:
            self.metrics = MetricsLogger(self.folder.path / self.subcommand / "metrics.csv")
            self.metrics.cut_after(-1)
            self.save_config_callback = None
        self._find_checkpoint()

    def _claim_folder(self, overwrite: bool) -> None:
        """Starts, resumes or reports, by what is in the run folder."""
        if not overwrite:
            config = self._parser(self.subcommand).dump(self.options, skip_unset=False)
            self.folder.check_owner(yaml.safe_load(config))
            if self.folder.is_finished:
                say(f"{self.folder.path} holds this run, finished; --run.overwrite true would do it again.")
                rank_zero_only(self.report)()
                raise SystemExit(0)
            if (point := self.folder.resume_point()) is not None:
                path, step = point
                say(f"resuming {self.folder.path} after step {step}")
                self.folder.clear_after(step)
                self.metrics.cut_after(step)
                self.options.ckpt_path = str(path)
                self.save_config_callback = None  # config.yaml is that of the start
                return
        self.folder.clear()

    def _find_checkpoint(self) -> None:
        path = self.options.ckpt_path
        last = self.folder.last_checkpoint
        if path == "last":
            self.options.ckpt_path = path = str(last) if last.exists() or not self.is_training_run else None
        if path not in (None, "best") and not Path(path).exists():
            raise ConfigError(f"ckpt_path: expected a checkpoint, found no {path}.")
        if path is None and not self.is_training_run and last.exists():
            say(f"{self.subcommand} takes the initial weights of model:; --ckpt_path last takes those of this run")

    def own_callbacks(self) -> list[pl.Callback]:
        """Callbacks that need no configuration; one of the same class in `trainer.callbacks` takes its place."""
        return [self.stop]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand].trainer
        listed = config.callbacks or []
        listed = listed if isinstance(listed, list) else [listed]
        own = self.own_callbacks()
        if self.is_training_run and config.enable_checkpointing is not False:
            own = [PublishCheckpoint(self.checkpoint), *own, self.checkpoint]
        taken = {type(callback) for callback in listed}
        kwargs["callbacks"] = [*(callback for callback in own if type(callback) not in taken), *listed]
        kwargs["default_root_dir"] = self.metrics.save_dir
        if config.logger is not False:
            more = config.logger if isinstance(config.logger, list) else [config.logger]
            kwargs["logger"] = [self.metrics, *(logger for logger in more if logger not in (None, True))]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise ConfigError(f"trainer: {error}") from error
        self.metrics.trainer = trainer
        return trainer

    def train(self, **kwargs: Any) -> None:
        """Fits, and leaves where a signal came during the last step."""
        self.trainer.fit(**kwargs)
        if self.stop.is_stopping:
            self.stop.leave(self.trainer.global_step)

    def report(self) -> None:
        """Tells the result of a finished run."""
        print_report(self.folder.path)

    @property
    def facts(self) -> dict[str, Any]:
        """What a summary tells beside the metrics."""
        return {"seconds": round(self.checkpoint.seconds, 1), "seed": self.options.seed_everything}


class SearchCLI(RunCLI):
    """`fit`, `validate`, `test` and `predict` of SDSearchModule, with the three callbacks as named groups."""

    module_class = SDSearchModule
    training = "fit"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        groups = {"rollout": RolloutGrouping, "hindsight": HindsightConstruction, "jsd": JSDWeightScheduler}
        for name, callback in groups.items():  # in the order in which they run
            parser.add_lightning_class_args(callback, name)
        parser.link_arguments("seed_everything", "rollout.seed", int)
        parser.link_arguments("rollout.temperature", "model.temperature")

    def own_callbacks(self) -> list[pl.Callback]:
        return [*super().own_callbacks(), TrajectoryLog()]

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
        if self.trainer.is_global_zero:
            self.folder.replace_model(self.model.save_pretrained)
            finish_run(self.folder.path, self.facts | {"max_searches": self.options.rollout.max_searches})


class SuperviseCLI(RunCLI):
    """`supervise`: SupervisedModule, without rollouts."""

    module_class = SupervisedModule
    training = "supervise"
    defaults = TRAINER_DEFAULTS | {"limit_val_batches": 0}  # a cold start has no rollouts to evaluate

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"supervise": LightningCLI.subcommands()["fit"]}

    def supervise(self, **kwargs: Any) -> None:
        """Trains, saves the model and writes a summary."""
        self.train(**kwargs)
        if self.is_training_run and self.trainer.is_global_zero:
            self.folder.replace_model(self.model.save_pretrained)
            metrics = read_metrics(self.folder.path)
            first, last = (metrics["train/loss"][i].value for i in (0, -1))
            facts = self.facts | {"steps": self.trainer.global_step, "train_loss": {"first": first, "last": last}}
            write_summary(self.folder.path, build_summary(metrics, facts))
            self.report()

    def report(self) -> None:
        summary = read_summary(self.folder.path) or {}
        loss = summary["train_loss"]
        say(
            f"cold start: {summary['steps']} steps in {duration(summary['seconds'])}, seed {summary['seed']}, "
            f"train/loss {loss['first']:.3f} -> {loss['last']:.3f}"
        )
        say(f"the model is in {self.folder.model}")


def link_seed(parser: LightningArgumentParser, module_class: type) -> None:
    """One seed for everything: `seed_everything` reaches each class that takes a seed."""
    parser.link_arguments("seed_everything", "data.init_args.seed", int)
    if "seed" in inspect.signature(module_class).parameters:
        parser.link_arguments("seed_everything", "model.seed", int)


def check_strategy(strategy: Any) -> None:
    """Refuses the sharding strategies that cannot train this module, or cannot yet."""
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", ""))
    if name.lower().startswith("fsdp2"):
        raise ConfigError("trainer.strategy fsdp2 is not part of this version yet. Use ddp.")
    if name.lower().startswith("fsdp") or name.endswith("FSDPStrategy"):
        raise ConfigError(
            f"trainer.strategy {name}: in Lightning, FSDP1 cannot train with manual optimisation. Its successor fsdp2 "
            "can, but is not part of this version yet. Use ddp."
        )


def export(argv: Sequence[str]) -> None:
    """Writes the weights of a checkpoint as a Hugging Face folder; the run's config.yaml tells what they belong to."""
    import torch

    parser = ShortErrorParser(prog="sdsearch export", description=export.__doc__)
    parser.add_argument("--ckpt_path", type=str, required=True, help="runs/<name>/checkpoints/<file>.ckpt")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    options = parser.parse_args(list(argv))
    path = Path(options.ckpt_path)
    if not path.is_file():
        raise ConfigError(f"ckpt_path: expected a single-file checkpoint, found none at {path}.")
    if Path(options.output).exists():
        raise ConfigError(f"output: {options.output} exists already; name a new folder.")
    config_path = RunFolder(path.absolute().parent.parent).config
    if not config_path.is_file():
        raise ConfigError(f"expected the run's configuration at {config_path}: export needs the folder that fit wrote.")
    module = build_module(yaml.safe_load(config_path.read_text(encoding="utf-8")))
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    module.save_pretrained(options.output)
    say(f"step {checkpoint['global_step']} of {path} is now a Hugging Face folder: {options.output}")


def build_module(config: dict[str, Any]) -> Any:
    """The module that a saved configuration describes, with its model, without a trainer."""
    module_class = SDSearchModule if "rollout" in config else SupervisedModule
    parser = LightningArgumentParser()
    parser.add_argument("--seed_everything", type=int)
    parser.add_lightning_class_args(module_class, "model")
    parser.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
    link_seed(parser, module_class)
    groups = {key: config[key] for key in ("seed_everything", "model", "data")}
    built = parser.instantiate_classes(parser.parse_object(groups))
    built.model.trainer = SimpleNamespace(datamodule=built.data)  # a from-scratch model asks it for the vocabulary
    built.model.configure_model()
    return built.model


def report(argv: Sequence[str]) -> None:
    """Prints the report of a run and writes its report.html anew."""
    parser = ShortErrorParser(prog="sdsearch report", description=report.__doc__)
    parser.add_argument("run", type=str, help="the run folder, such as runs/quickstart")
    print_report(Path(parser.parse_args(list(argv)).run))


@rank_zero_only
def say(line: str) -> None:
    """Prints one line of progress."""
    print(line, flush=True)


def run(argv: Sequence[str]) -> int:
    """Runs a command of `__main__.COMMANDS`; returns its exit code."""
    quieten()
    command = argv[0]
    handler: Callable[[], Any] = {
        "export": lambda: export(argv[1:]),
        "report": lambda: report(argv[1:]),
        "supervise": lambda: SuperviseCLI(argv),
    }.get(command, lambda: SearchCLI(argv))
    try:
        handler()
    except (SDSearchError, MisconfigurationException) as error:
        if os.environ.get("SDSEARCH_TRACEBACK", "0") != "0":
            raise
        fail(str(error), 2 if isinstance(error, (ConfigError, MisconfigurationException)) else 1)
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns Ctrl-C outside of our handlers into exit code 1.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            return 130
        raise
    return 0


NOISE = re.compile(
    r"(\[rank: \d+\] )?(💡 Tip|GPU available|TPU available|HPU available|Seed set to|`Trainer.fit` stopped|Restor|Loaded model)"
)
"""Openings of log lines that tell a user nothing."""
IDLE_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning's own use of torch
    "You passed in a `val_dataloader` but have no `validation_step`",  # a cold start
    ".*does not have many workers",  # questions are text in memory
    "It is recommended to use `self.log",  # what the modules log is summed over ranks already
    "Found .* in eval mode at the start of training",  # the frozen reference model
)


def quieten() -> None:
    """Drops advertisements, and warnings that no user can act on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: NOISE.match(record.getMessage()) is None)
    for message in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", module="jsonargparse")
    transformers.utils.logging.disable_progress_bar()  # it would count the files of each model that is saved
