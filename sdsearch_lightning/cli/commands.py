"""From a command's name to its code, and from an error to a line and an exit code; `report` stands here."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException

from sdsearch_lightning.cli import export as export_command, retrieval as retrieval_commands
from sdsearch_lightning.cli.errors import ShortErrorParser, fail
from sdsearch_lightning.cli.plan import plan
from sdsearch_lightning.cli.training import SearchCLI, SuperviseCLI
from sdsearch_lightning.errors import ConfigError, SDSearchError
from sdsearch_lightning.report import print_report

NOISE = re.compile(
    r"(\[rank: \d+\] )?"
    r"(💡 Tip|[GTH]PU available|Seed set to|`Trainer.fit` stopped|Restor|Loaded model|Initializing distributed|---)"
)
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
        "export": partial(export_command.export, argv[1:]),
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
    for name in (
        "pytorch.utilities.rank_zero",
        *(f"fabric.utilities.{n}" for n in ("rank_zero", "seed", "distributed")),
    ):
        logging.getLogger(f"lightning.{name}").addFilter(lambda record: NOISE.match(record.getMessage()) is None)
    for message in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what lightning's own CLI calls
    transformers.utils.logging.disable_progress_bar()  # it would count the files of each model that is saved


def report(argv: Sequence[str]) -> None:
    """Prints the report of a run and writes its report.html anew."""
    parser = ShortErrorParser(prog="sdsearch report", description=str(report.__doc__))
    parser.add_argument("run", type=str, help="the run folder, such as runs/quickstart")
    print_report(Path(parser.parse_args(list(argv)).run))
