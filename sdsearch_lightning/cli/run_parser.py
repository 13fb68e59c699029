"""The parser of the commands with a trainer: short errors, and a help that begins with the keys of this library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser

from sdsearch_lightning.cli.errors import ShortErrorParser
from sdsearch_lightning.cli.names import COMMANDS
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.lora import LoRA
from sdsearch_lightning.training.options import OptimizerSpec

GROUPS = {
    "run": "where a run keeps its files",
    "model": "the policy, what it learns from, and how",
    "data": "questions and the retriever (these keys: SearchDataModule)",
    "rollout": "how the policy searches, and what a rollout is worth",
    "hindsight": "which groups the teacher is shown, and what it reads",
    "jsd": "how much self-distillation counts, step by step",
    "credit": "how much the credit of single searches counts, step by step",
    "trainer": "Lightning's Trainer",
}
"""In the order of the help. What is in none of them comes before (options) or after (those of the command)."""
NESTED = {
    "model.entropy_coef": "weight of the entropy at each kind of token",
    "model.loss_weights": "weight of each kind of token in the loss",
    "model.compute": "how passes are run; nothing here changes a loss",
}
UNFOLDED = {
    "model.optimizers": (OptimizerSpec, "keys of each entry of the list"),
    "model.scratch": (ScratchModel, "a new model, where there is no model_name_or_path"),
    "model.lora": (LoRA, "low-rank adapters, where not all weights are trained"),
    "data": (SearchDataModule, GROUPS["data"]),
}
"""Keys that take an object of a class: the help lists that class's keys as well."""
TEXTS = {
    "seed_everything": "the one seed: of data.seed, model.seed and rollout.seed too; true draws one",
    "config": "a YAML file of keys; may be given several times, and later ones win",
    "data": "the data module, by name or class_path; its keys are --data.KEY VALUE, or init_args in a file",
    "ckpt_path": "checkpoint to take weights and state from: a file, a folder of shards, or `last`, the run's own. "
    "A run that is under way resumes without it; null: start from model:",
}
"""Keys whose text is Lightning's or jsonargparse's, and not true here in all it says."""


class RunParser(ShortErrorParser, LightningArgumentParser):
    """LightningCLI's parser, whose help begins with the keys of this library."""

    def format_help(self, *args: Any) -> str:
        groups = self._action_groups
        self._action_groups = arranged(self)
        try:
            return super().format_help(*args)
        finally:
            self._action_groups = groups


def arranged(parser: RunParser) -> list[Any]:
    """The groups of a command's help, in the order of `GROUPS`; those of another parser as they are."""
    named: dict[str, Any] = dict(parser.groups or {})
    if "trainer" not in named:
        return list(parser._action_groups)
    for name, group in named.items():
        group.title = _title(name, group)
    for name, (kind, title) in UNFOLDED.items():
        if any(action.dest == name for action in parser._actions):
            named[name] = _keys_of(kind, name, title, named.get(name))
    for action in parser._actions:
        action.help = TEXTS.get(action.dest, action.help)
    own = [group for key in GROUPS for name, group in named.items() if name.split(".")[0] == key]
    rest = [group for name, group in named.items() if name.split(".")[0] not in GROUPS]
    return [*(group for group in parser._action_groups if group.title == "options"), *own, *rest]


def _title(name: str, group: Any) -> str | None:
    if name in COMMANDS:
        return f"of {name} alone"
    title: str | None = GROUPS.get(name) or NESTED.get(name)
    return f"{name}: {title}" if title else group.title


def _keys_of(kind: type, name: str, title: str, group: Any) -> Any:
    """A group with the keys of a class, after those that are in `group`."""
    other = ShortErrorParser(add_help=False)
    other.add_class_arguments(kind, name, skip={"seed"})
    (added,) = [found for found in other._action_groups if found._group_actions]
    added.title = f"{name}: {title}"
    keys = [action for action in added._group_actions if action.dest != name]
    added._group_actions = [*(group._group_actions if group else ()), *keys]
    return added


def parser_settings(commands: Iterable[str]) -> dict[str, Any]:
    """What LightningCLI is to make its parsers with: the command's name is no key, and no key is abbreviated."""
    each = {
        command: {
            "allow_abbrev": False,
            "usage": f"sdsearch {command} [--config FILE ...] [--key value ...]",
            "description": COMMANDS[command],
        }
        for command in commands
    }
    return {"prog": "sdsearch", "allow_abbrev": False, **each}


def read_field_texts(argv: Sequence[str]) -> None:
    """Makes the texts under the fields of dataclasses part of the help, where a help is asked for.

    It means reading the source of every class again: seconds that no training run needs.
    """
    asked = any(argument == "-h" or argument.partition("=")[0].endswith("help") for argument in argv)
    set_parsing_settings(docstring_parse_attribute_docstrings=asked)
