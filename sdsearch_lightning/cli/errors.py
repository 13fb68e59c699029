"""Usage errors in at most three lines: what is wrong, where, and what was probably meant.

jsonargparse tells everything it tried, on up to sixty lines. `shorten` keeps the key and the phrase that names the
mistake; `ShortErrorParser` adds the closest key or name. Nothing else goes to standard error; the exit code is 2. No
torch here: a small command tells its errors at once.
"""

from __future__ import annotations

import pkgutil
import re
import sys
import time
from argparse import ArgumentError
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn, get_args

from jsonargparse import ArgumentParser
from lightning_utilities.core.rank_zero import rank_zero_only

from sdsearch_lightning.cli.help import HelpFormatter
from sdsearch_lightning.trust.secrets import without_secrets

MAX_LINES, MAX_COLUMNS = 3, 300
PATIENCE = 10.0
"""Seconds in which a rank that is not the first may be ended, before it tells an error that is its own."""

MISTAKES = (
    (re.compile(r"(?:unrecognized arguments: --|[Oo]ption ')([\w.\-]+)"), "unknown key '{0}'."),
    (re.compile(r"File does not exist: '?([^'\n]+)"), "there is no file {0}."),
    (re.compile(r"Expected a path but (\S+\.(?:ya?ml|json)) "), "there is no file {0}."),
    (re.compile(r"module '([\w.]+)' has no attribute '(\w+)'"), "there is no '{1}' in {0}."),
    (re.compile(r"No module named '([\w.]+)'"), "there is no module '{0}'."),
    (re.compile(r"Expected a dot import path string: (\S+)"), "there is no class '{0}'."),
    (re.compile(r"arguments are required: (?:\w+\.)?(\S+)"), "'{0}' is required, but was not given."),
)
"""Phrases that name a mistake, and how they are told; the first that occurs in a message is the one."""
_HINT = re.compile(r" Did you mean '[^']+'\?")


class ShortErrorParser(ArgumentParser):
    """jsonargparse's parser with short errors and a plain help."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter} | options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Writes at most three lines and exits with 2; a parser inside another raises, for other types may fit."""
        if not _HINT.search(message):  # the inner parser knows its own keys best
            message += self._hint(message)
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        fail(shorten(message))

    def _hint(self, message: str) -> str:
        unknown, _, _, missing, _, short, _ = (pattern.search(message) for pattern, _ in MISTAKES)
        if unknown:
            return _did_you_mean(unknown[1], self._keys_near(unknown[1]))
        if missing:
            return _did_you_mean(missing[2], _names_in(missing[1]))
        if short and (key := re.search(r'Parser key "([\w.]+)"', message)):
            return _did_you_mean(short[1], self._values_of(key[1]))
        return ""

    def _all_actions(self) -> list[Any]:
        subcommands = getattr(self._subcommands_action, "_name_parser_map", None) or {}
        return [action for parser in (self, *subcommands.values()) for action in parser._actions]

    def _keys_near(self, unknown: str) -> list[str]:
        """Keys of the group that `unknown` names; where there is no such group, the same key in each group."""
        keys = [action.dest for action in self._all_actions()]
        groups = {key.split(".")[0] for key in keys}
        group, _, rest = unknown.partition(".")
        if rest and group not in groups:
            return [f"{name}.{rest}" for name in groups]
        if elsewhere := [key for key in keys if not rest and key.rpartition(".")[2] == unknown]:
            return elsewhere
        same_group = [key for key in keys if key.startswith(f"{group}.")]
        # Without the common beginning, which would make any two keys of a group look alike.
        close = get_close_matches(rest, [key.partition(".")[2] for key in same_group], n=1, cutoff=0.7)
        return [f"{group}.{name}" for name in close] if rest else [*keys, *groups]

    def _values_of(self, key: str) -> set[str]:
        """Names that a key takes: strings of its Literals, and subclasses of its classes."""
        types = [getattr(action, "_typehint", None) for action in self._all_actions() if action.dest == key]
        return {name for hint in types for name in _names_of(hint)}


def shorten(message: str) -> str:
    """The key that a jsonargparse message is about and its mistake, on one line where it is a known one."""
    keys = ": ".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)":', message)))
    hint = _HINT.search(message)
    for pattern, told in MISTAKES:
        if found := pattern.search(message):
            text = told.format(*found.groups())
            break
    else:
        text = _told_type(message) or " ".join(re.sub(r'Parser key "[^"]+":', "", message).split())
    return (f"{keys}: " if keys else "") + text + (hint[0] if hint and hint[0] not in text else "")


def _told_type(message: str) -> str:
    """`expected bool or int, got x`; empty where the message is not about types."""
    expected = re.findall(r"Expected an? (?:<class '([\w.]+)'>|typing\.Literal(\[[^\]]*\]))", message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    names = dict.fromkeys(name or literal for name, literal in expected if name != "NoneType")
    return f"expected {' or '.join(names)}, got {value[1].strip()}" if names and value else ""


def fail(message: str, code: int = 2) -> NoReturn:
    """Writes `error: message`, at most three lines, and exits with `code`.

    An error that all processes have is told once: rank 0 tells it and ends the others, or whoever started them does.
    """
    if rank := getattr(rank_zero_only, "rank", 0):
        time.sleep(PATIENCE)
        message = f"rank {rank}: {message}"
    lines = [line for line in f"error: {without_secrets(message)}".split("\n") if line.strip()]
    shown = ("".join(c if c.isprintable() else " " for c in line[:MAX_COLUMNS]) for line in lines[:MAX_LINES])
    sys.stderr.writelines(f"{line}\n" for line in shown)
    sys.exit(code)


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    if within := [other for other in candidates if other.endswith(f".{name}")]:
        return " Did you mean " + " or ".join(f"'{other}'" for other in within) + "?"
    close = get_close_matches(name, sorted(set(candidates)), n=1, cutoff=0.7)
    return f" Did you mean '{close[0]}'?" if close else ""


def _names_in(module_name: str) -> list[str]:
    """Attributes and submodules of a module."""
    module = import_module(module_name)
    submodules = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return [*dir(module), *submodules, *(("callbacks", "datamodules") if module_name == "sdsearch_lightning" else ())]


def _names_of(hint: Any) -> list[str]:
    """Strings and class names in a type hint, subclasses included."""
    if isinstance(hint, str):
        return [hint]
    if isinstance(hint, type) and not get_args(hint) and hint.__module__ != "builtins":
        children: list[type] = type.__subclasses__(hint)
        return [hint.__name__, *(name for child in children for name in _names_of(child))]
    parts = (part for arg in get_args(hint) for part in (arg if isinstance(arg, list) else [arg]))
    return [name for part in parts for name in _names_of(part)]
