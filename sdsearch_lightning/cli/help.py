"""How a key is shown by `--help`: its text, then type, default and the classes that it takes, in words a user can type.

No torch here: the small commands show their help with it too.
"""

from __future__ import annotations

import re
import textwrap
from argparse import SUPPRESS, Action
from collections.abc import Iterable, Mapping
from typing import Any

from jsonargparse import DefaultHelpFormatter, Namespace
from jsonargparse._actions import ActionConfigFile, _ActionConfigLoad, _ActionHelpClassPath
from jsonargparse._link_arguments import ActionLink
from jsonargparse._typehints import ActionTypeHint

ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
LINK = re.compile(r"`([^`<]+?)\s*<[^>`]+>`_")
"""A cross-reference and a link of reStructuredText, as Lightning's texts have them; its last name, its words stay."""
OFFERED = re.compile(r"torch\.optim\.(?!Optimizer$)\w+|sdsearch_lightning\..+")
"""Classes that a key of ours lists."""
OFFERED_BY_TRAINER = re.compile(r"sdsearch_lightning\.callbacks\.\w+")
"""The same of the trainer's keys: what users add. All else is Lightning's own, or put there by the command."""
NOT_OFFERED = {
    "RolloutGrouping",
    "HindsightConstruction",
    "JSDWeightScheduler",
    "CreditWeightScheduler",
    "CopiedTeacher",
}
"""Those that have a group of their own, and a base class."""


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter without what only it can read: object addresses, module paths, a usage of pages."""

    def add_usage(self, usage: str | None, actions: Iterable[Action], *args: Any, **options: Any) -> None:
        listed = list(actions)
        if usage is None and all("." in option for action in listed for option in action.option_strings):
            usage = SUPPRESS  # the help of a class, `--key.help CLASS`, belongs to no command line of its own
        super().add_usage(usage, listed, *args, **options)

    def _format_action(self, action: Action) -> str:
        # `--key.help` is told in the text of its key; a linked key is set by another one.
        return "" if isinstance(action, (_ActionHelpClassPath, ActionLink)) else super()._format_action(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)

    def _format_action_invocation(self, action: Action) -> str:
        first, *others = action.option_strings or [""]
        if others != [f"{first}+"]:
            return super()._format_action_invocation(action)
        metavar = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{first}[+] {metavar}"  # with a plus it adds to a list

    def _get_help_string(self, action: Action) -> str:
        if getattr(action, "_jsonargparse_preexpanded_help", False):
            return action.help or ""
        if isinstance(action, _ActionConfigLoad):
            return "a YAML file with the keys of this group"
        if isinstance(action, ActionConfigFile) or action.nargs == 0:
            return plain(action.help or "")
        facts, text = ", ".join(self._facts(action)), plain(action.help or "")
        return " ".join(part for part in (text, f"({facts})" if facts else "", offered(action)) if part)

    def _facts(self, action: Action) -> list[str]:
        kind = self._get_type_str(action)
        facts = ["required"] if action.required else []
        if kind and kind != "bool" and not action.choices and not kind.startswith("Literal["):
            facts.append(f"type: {kind}")
        if action.option_strings and action.default != SUPPRESS and not (action.required and action.default is None):
            facts.append(f"default: {shown(action.default)}")
        return facts

    def _get_type_str(self, action: Action) -> str | None:
        kind = super()._get_type_str(action)
        return re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", kind) if kind else kind


def plain(text: str) -> str:
    """Lightning's and our texts without markup."""
    return LINK.sub(r"\1", ROLE.sub(r"\1", text)).replace("``", "`")


def shown(value: Any) -> str:
    """A default as one would type it: `null`, `true`, `AdamW(lr=1e-06)`."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, Mapping) and "class_path" in value:
        options = ", ".join(f"{name}={shown(option)}" for name, option in (value.get("init_args") or {}).items())
        return value["class_path"].rpartition(".")[2] + (f"({options})" if options else "")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def offered(action: Action) -> str:
    """The classes that a key takes, and how to see their keys; empty where it takes none."""
    if not isinstance(action, ActionTypeHint) or not (paths := action.extra_help()):
        return ""
    pattern = OFFERED_BY_TRAINER if action.dest.startswith("trainer.") else OFFERED
    found = [path for path in paths.partition(": ")[2].split(", ") if pattern.fullmatch(path)]
    names = [name for name in (path.rpartition(".")[2] for path in found) if name not in NOT_OFFERED]
    listed = f"Classes: {', '.join(names)}. " if names else ""
    return f"{listed}Keys of one: --{action.dest}.help {names[-1] if names else 'CLASS'}"
