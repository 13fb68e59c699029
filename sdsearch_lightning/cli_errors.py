"""Usage errors in at most three lines: what is wrong, where, and what was probably meant.

jsonargparse tells everything it tried, on up to sixty lines; `shorten` keeps the line that names the mistake, and
`ShortErrorParser` adds the closest key or class name. Nothing else is written to standard error; the exit code is 2.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

MAX_LINES, MAX_COLUMNS = 3, 300

_UNKNOWN_KEY = re.compile(r"(?:unrecognized arguments: --|(?:option|Option) ')([\w.\-]+)")
_MISSING_NAME = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_SHORT_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_BASE_CLASSES = re.compile(r"<class '([\w.]+)'>")
_MISTAKES = (
    re.compile(r".* is not accepted.*"),
    re.compile(r"module '.*' has no attribute.*"),
    re.compile(r"No module named.*"),
    re.compile(r"Expected a dot import path string.*"),
    re.compile(r"Key .* is required.*"),
    re.compile(r"(?!.*NoneType)Expected an? .*"),
)
"""Lines that name a mistake, the most telling kind first."""


class ShortErrorParser(LightningArgumentParser):
    """LightningCLI's parser with short errors."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Writes at most three lines and exits with 2; a parser inside another raises instead, for it may be tried."""
        message += self._hint(message)
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        fail(shorten(message))

    def _hint(self, message: str) -> str:
        if "Did you mean" in message:  # an inner parser knew better
            return ""
        if unknown := _UNKNOWN_KEY.search(message):
            return _did_you_mean(unknown[1], self._keys(unknown[1]))
        if missing := _MISSING_NAME.search(message):
            return _did_you_mean(missing[2], _names_in(missing[1]))
        if short := _SHORT_CLASS.search(message):
            bases = [_load(path) for path in _BASE_CLASSES.findall(message)]
            return _did_you_mean(short[1], {name for base in bases for name in _subclass_names(base)})
        return ""

    def _keys(self, unknown: str) -> list[str]:
        """Keys of the subcommand parser, or of this one; for a key of one part also the groups."""
        parsers = [self, *(getattr(self._subcommands_action, "_name_parser_map", None) or {}).values()]
        keys = [action.dest for parser in parsers for action in parser._actions]
        groups = {key.split(".")[0] for key in keys}
        root, _, rest = unknown.partition(".")
        if rest and root not in groups:  # the group is what is misspelt
            return [f"{group}.{rest}" for group in groups]
        return [*keys, *groups]


def shorten(message: str) -> str:
    """The line of a jsonargparse message that names the mistake, after the key it is about."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    keys = [m[1] for line in lines if (m := re.match(r'Parser key "([^"]+)":', line))]
    lines = [line for line in lines if not line.startswith("Parser key") or not line.endswith(":")]
    hint = next((m[0] for line in lines if (m := re.search(r" Did you mean .*", line))), "")
    found = [line for pattern in _MISTAKES for line in lines if pattern.fullmatch(line)]
    told = _told(found, lines) if keys else " ".join(lines)
    told = told if not hint or "Did you mean" in told else told + hint
    return _plain(": ".join([*keys, told]))


def _told(found: list[str], lines: list[str]) -> str:
    if not found:
        return " ".join(lines)
    if not found[0].startswith("Expected a <class"):
        return found[0]
    # "expected bool or int, got 'x'": one line per type that was tried
    types = dict.fromkeys(name for line in found for name in _BASE_CLASSES.findall(line))
    value = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("Given value:")), "")
    got = re.search(r"Got value: (.*)", found[0])
    return f"expected {' or '.join(types)}, got {got[1] if got else value}"


def _plain(text: str) -> str:
    """Python's notation put as a user writes it."""
    text = re.sub(r"^unrecognized arguments: --(\S+).*?(?= Did you mean|$)", r"unknown key '\1'.", text)
    text = re.sub(r"Subcommand '\w+' does not accept option '([^']+)'", r"unknown key '\1'.", text)
    text = re.sub(
        r"(Option|Group '\w+' does not accept option) '([^']+)'( is not accepted)?", r"unknown key '\2'.", text
    )
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class '\1'.", text)
    text = re.sub(r"the following arguments are required: \w+\.", "required: ", text)
    return re.sub(r"<class '([^']+)'>", r"\1", text)


def fail(message: str, code: int = 2) -> NoReturn:
    """Writes `error: message`, at most three lines, and exits with `code`."""
    lines = [line for line in message.strip().splitlines() if line.strip()][:MAX_LINES]
    for line in (f"error: {lines[0]}", *lines[1:]) if lines else ("error",):
        sys.stderr.write(f"{line[:MAX_COLUMNS]}\n")
    sys.exit(code)


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    close = get_close_matches(name, sorted(set(candidates)), n=1, cutoff=0.7)
    return f" Did you mean '{close[0]}'?" if close else ""


def _names_in(module_name: str) -> list[str]:
    """Attributes and submodules of a module."""
    module = import_module(module_name)
    submodules = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", ()))]
    return [*dir(module), *submodules, *(("callbacks", "datamodules") if module_name == "sdsearch_lightning" else ())]


def _load(class_path: str) -> type | None:
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _subclass_names(base: type | None) -> list[str]:
    if base is None or base is type(None):
        return []
    return [base.__name__, *(name for child in type.__subclasses__(base) for name in _subclass_names(child))]
