"""From a command's name to its code, and from an error to a line and an exit code.

Each command imports what it needs when it runs, and its help before that: torch alone takes seconds. Those with a
trainer are in training.py, those without in parsers.py and retrieval.py.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdsearch_lightning.cli.config_files import check_config_files
from sdsearch_lightning.cli.errors import fail
from sdsearch_lightning.errors import ConfigError, SDSearchError, StorageError, first_line
from sdsearch_lightning.files import FULL, GO_ON

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
_MAKING = re.compile(r"Problem with given class_path '([^']+)'")
"""How jsonargparse begins, where the class of a key raised an error."""


def run(argv: Sequence[str]) -> int:
    """Runs a command of `names.COMMANDS`; returns its exit code."""
    handlers: dict[str, Callable[[Sequence[str]], Any]] = {
        "ask": _ask,
        "export": _export,
        "report": _report,
        "browse": _browse,
        "index": _index,
        "serve": _serve,
        "completion": _completion,
        "plan": _plan,
        "demonstrate": _demonstrate,
        "supervise": _supervise,
    }

    def work() -> None:
        check_config_files(argv)
        handlers[argv[0]](argv[1:]) if argv[0] in handlers else _search(argv)

    return guarded(work)


def guarded(work: Callable[[], Any]) -> int:
    """Does the work of a command; returns its exit code, after a line where an error is meant for the user."""
    quieten()
    try:
        try:
            work()
        except Exception as error:
            told = _told(error) if isinstance(error, (ValueError, OSError, *_refusals())) else None
            if told is None or os.environ.get("SDSEARCH_TRACEBACK", "0") != "0":
                raise
            fail(str(told), code=1 if isinstance(told, SDSearchError) and not isinstance(told, ConfigError) else 2)
    except (KeyboardInterrupt, SystemExit) as end:
        # Lightning turns a Ctrl-C that comes before training into exit code 1.
        if isinstance(end, KeyboardInterrupt) or isinstance(end.__context__, KeyboardInterrupt):
            return 130
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
            return 1
        return end.code or 0
    return 0


def _search(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.training import SearchCLI

    SearchCLI(argv)


def _supervise(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.cold_start import SuperviseCLI

    SuperviseCLI(["supervise", *argv])


def _ask(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.parsers import ask_parser, split_keys

    own, keys = split_keys(argv)
    options = ask_parser().parse_args(own)
    if options.question is not None and not options.question.strip():
        raise ConfigError("question: expected some text, found none.")
    from sdsearch_lightning.inference.origin import find_origin

    given = [key.removeprefix("--").partition("=")[0] for key in keys]
    origin = find_origin(options.run, options.model, options.config or (), options.ckpt_path, given)
    from sdsearch_lightning.cli.ask import answer_all

    answer_all(options, origin, keys)


def _plan(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.parsers import plan_parser

    own, keys = plan_parser().parse_known_args(list(argv))
    from sdsearch_lightning.cli.plan import plan

    plan(own, keys)


def _demonstrate(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.parsers import demonstrate_parser

    own, keys = demonstrate_parser().parse_known_args(list(argv))
    from sdsearch_lightning.cli.demonstrate import demonstrate

    demonstrate(own, keys)


def _export(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.parsers import export_parser

    options = export_parser().parse_args(list(argv))
    from sdsearch_lightning.cli.export import export

    export(options)


def _report(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.parsers import report_parser

    options = report_parser().parse_args(list(argv))
    from sdsearch_lightning.report import compare_runs, print_report

    folders = [Path(run) for run in options.run]
    if len(folders) > 1:
        compare_runs(folders, Path(options.output or "comparison.html"))
    else:
        print_report(folders[0], options.output and Path(options.output))


def _browse(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.parsers import browse_parser

    options = browse_parser().parse_args(list(argv))
    from sdsearch_lightning.report.browse import browse

    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("sdsearch browse needs a terminal. sdsearch report writes the same as a page, report.html.")
    browse(Path(options.run))


def _index(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.retrieval import index

    index(argv)


def _serve(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.retrieval import serve

    serve(argv)


def _completion(argv: Sequence[str]) -> None:
    from sdsearch_lightning.cli.completion import completion_script
    from sdsearch_lightning.cli.parsers import completion_parser

    print(completion_script(completion_parser().parse_args(list(argv)).shell, run), end="")


def _refusals() -> tuple[type[Exception], ...]:
    """Errors that are meant for the user: ours, and Lightning's for its settings where Lightning was imported."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    return (SDSearchError, *([exceptions.MisconfigurationException] if exceptions is not None else []))


def _told(error: BaseException | None) -> BaseException | None:
    """The error meant for the user, where `error` is it or came of it: jsonargparse wraps what an `__init__` raises."""
    named = ""
    while error is not None and not isinstance(error, _refusals()):
        if isinstance(error, OSError) and error.errno in FULL:
            return StorageError(f"{error.filename or 'a file'} could not be written: {error.strerror}. {GO_ON}")
        if named and isinstance(error, (ImportError, OSError)):
            return ConfigError(f"{named} cannot be made: {first_line(error)}.")
        if given := _MAKING.match(str(error)):
            named = given[1]
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
    # Bars would count the files of each model that is saved. transformers reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
