"""`sdsearch demonstrate`: a user's script searches with the run's retriever and answers; a file of demonstrations."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from jsonargparse import Namespace
from rich.table import Table

from sdsearch_lightning.cli.run_parser import RunParser
from sdsearch_lightning.cli.settings import SettingsCLI
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.datamodules.demonstrations import check_suffix, write_demonstrations
from sdsearch_lightning.datamodules.readers import question_rows
from sdsearch_lightning.datamodules.scripts import ScriptDriver, Tally
from sdsearch_lightning.errors import ConfigError, first_line
from sdsearch_lightning.report.console import make_console
from sdsearch_lightning.report.example import harmless
from sdsearch_lightning.retrieval import check_retriever
from sdsearch_lightning.scoring.rewards import ExactMatchReward, LabelRule
from sdsearch_lightning.scoring.scoring import Scoring

FUNCTION = "script"
"""The function's name, where none is given."""


class DemonstrateCLI(SettingsCLI):
    """Makes the data module and the rule of labels."""

    data: SearchDataModule
    label: LabelRule

    def instantiate_classes(self) -> None:
        """No model and no engine are needed."""
        parser = RunParser()
        parser.add_lightning_class_args(SearchDataModule, "data", subclass_mode=True)
        parser.add_argument("--label", type=LabelRule)
        made = parser.instantiate_classes(Namespace(data=self.options.data, label=self.options.rollout.label))
        self.data, self.label = made.data, made.label


def demonstrate(own: argparse.Namespace, keys: Sequence[str]) -> None:
    """Writes the file and prints a table.

    Args:
        own: options of `demonstrate_parser`.
        keys: those of `fit`, as they were given.
    """
    if own.limit is not None and own.limit < 1:
        raise ConfigError(f"limit: expected at least 1, found {own.limit}.")
    if check_suffix(own.output).resolve() == Path(own.questions).resolve():
        raise ConfigError(f"output: expected another file than the questions', found {own.output} for both.")
    script = load_script(own.script)
    cli = DemonstrateCLI(["fit", *keys])
    data, asked = cli.data, (own.questions, own.limit, cli.data.columns)
    if data.retriever is None:
        raise ConfigError("data.retriever is empty: a script needs something to search. Set it, or use a world.")
    driver = ScriptDriver(
        script,
        data.retriever,
        cli.options.rollout.top_k,
        cli.label,
        own.block_share,
        tuple(own.num_siblings),
        own.max_searches,
        own.seed,
    )
    _, first = next(question_rows(*asked))
    Scoring(ExactMatchReward(), driver.label).probe(first)  # before an index is built
    data.prepare_data()
    tally = Tally()
    rows = ((row, replace(question, normalization=data.normalization)) for row, question in question_rows(*asked))
    with closing(data.retriever):
        check_retriever(data.retriever, driver.top_k)
        write_demonstrations(own.output, tally.counting(driver.run(rows)), not own.without_observations)
    print_tally(tally, own.output)


def print_tally(tally: Tally, output: str) -> None:
    """Print what was written; a share of nothing is a dash."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("demonstrations", str(tally.demonstrations))
    table.add_row("searches per demonstration", _share(tally.searches, tally.demonstrations, ".2f"))
    table.add_row("right answers (exact match)", _share(tally.right, tally.demonstrations, ".1%"))
    table.add_row("CORRECT siblings", _share(tally.correct_siblings, tally.siblings, ".1%"))
    console = make_console()
    console.print(table)
    console.print(
        harmless(f"learn them: sdsearch supervise --data.demonstration_files {output} ..."),
        markup=False,
        soft_wrap=True,
    )


def _share(part: int, whole: int, form: str) -> str:
    return format(part / whole, form) if whole else "-"


def load_script(name: str) -> Any:
    """The function that `FILE.py[:function]` or `package.module[:function]` names; its module is imported.

    Raises:
        ConfigError: there is no such file, module or function, or it cannot be imported.
    """
    place, _, function = name.partition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        told = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"script: {place} cannot be imported: {told}.") from error
    found = getattr(module, function or FUNCTION, None)
    if not callable(found):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise ConfigError(
            f"script: expected a function {function or FUNCTION!r} in {place}, found {', '.join(own) or 'none'}. "
            f"Name it: --script {place}:NAME."
        )
    return found


def _module_of_file(path: Path) -> ModuleType:
    """The module in a file, which may import its neighbours as if Python had been started with it."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    name = f"script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a file that ends in .py has a loader"
    sys.path.insert(0, str(path.resolve().parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
