"""From a command's name to its code, and from an error to a line and an exit code; `export` and `report` stand here.

Next: cli.py, the commands with a trainer; retrieval_commands.py, `index` and `serve`.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from sdsearch_lightning import retrieval_commands
from sdsearch_lightning.cli import SearchCLI, SuperviseCLI, link_seed, say
from sdsearch_lightning.cli_errors import ShortErrorParser, fail
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.plan.command import plan
from sdsearch_lightning.report import print_report
from sdsearch_lightning.run_folder import RunFolder
from sdsearch_lightning.supervised import SupervisedModule

NOISE = re.compile(r"(\[rank: \d+\] )?(💡 Tip|[GTH]PU available|Seed set to|`Trainer.fit` stopped|Restor|Loaded model)")
"""Openings of log lines that tell a user nothing."""
IDLE_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning's own use of torch
    "You passed in a `val_dataloader` but have no `validation_step`",  # a cold start
    ".*does not have many workers",  # questions are text in memory
    "It is recommended to use `self.log",  # what the modules log is summed over ranks already
    "Be aware that when using `ckpt_path`",  # evaluation needs no checkpoint callback
    "Found .* in eval mode at the start of training",  # the frozen reference model
)


def run(argv: Sequence[str]) -> int:
    """Runs a command of `__main__.COMMANDS`; returns its exit code."""
    quieten()
    handlers: dict[str, Callable[[], Any]] = {
        "export": partial(export, argv[1:]),
        "report": partial(report, argv[1:]),
        "index": partial(retrieval_commands.index, argv[1:]),
        "serve": partial(retrieval_commands.serve, argv[1:]),
        "plan": partial(plan, argv[1:]),
        "supervise": partial(SuperviseCLI, argv),
    }
    try:
        handlers.get(argv[0], partial(SearchCLI, argv))()
    except (ValueError, SDSearchError, MisconfigurationException) as error:
        told = _told(error)
        if told is None or os.environ.get("SDSEARCH_TRACEBACK", "0") != "0":
            raise
        fail(str(told), code=2 if isinstance(told, (ConfigError, MisconfigurationException)) else 1)
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns a Ctrl-C that comes before training into exit code 1.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            return 130
        raise
    return 0


def _told(error: BaseException | None) -> BaseException | None:
    """The error meant for the user, where `error` is it or came of it: jsonargparse wraps what an `__init__` raises."""
    while error is not None and not isinstance(error, (SDSearchError, MisconfigurationException)):
        error = error.__cause__
    return error


def quieten() -> None:
    """Drops advertisements, and warnings that no user can act on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: NOISE.match(record.getMessage()) is None)
    for message in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what lightning's own CLI calls
    transformers.utils.logging.disable_progress_bar()  # it would count the files of each model that is saved


def report(argv: Sequence[str]) -> None:
    """Prints the report of a run and writes its report.html anew."""
    parser = ShortErrorParser(prog="sdsearch report", description=str(report.__doc__))
    parser.add_argument("run", type=str, help="the run folder, such as runs/quickstart")
    print_report(Path(parser.parse_args(list(argv)).run))


def export(argv: Sequence[str]) -> None:
    """Writes the weights of a checkpoint as a Hugging Face folder; the run's config.yaml tells what they belong to."""
    parser = ShortErrorParser(prog="sdsearch export", description=str(export.__doc__))
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
        raise ConfigError(f"ckpt_path: expected the run's configuration at {config_path}, found none.")
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
