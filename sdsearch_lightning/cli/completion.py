"""`sdsearch completion SHELL`: a script that completes commands and keys, from the commands' own helps."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec

from sdsearch_lightning.cli.names import COMMANDS
from sdsearch_lightning.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("config", "corpus_path", "ckpt_path", "index_path", "output", "run", "model", "script", "questions")
"""Keys that take a path; after the others nothing is proposed."""
_KEY = re.compile(r"^ +(?:-\w(?: [A-Z_]+)?, )?--([\w.]+)", re.MULTILINE)
_NAME = re.compile(r"[\w.]+")


def completion_script(shell: str, run: Callable[[Sequence[str]], object]) -> str:
    """The script for `shell`.

    Args:
        shell: one of SHELLS.
        run: runs a command with `--help`.

    Raises:
        ConfigError: another shell, or the extra `completion` is not installed.
    """
    if shell not in SHELLS:
        raise ConfigError(f"completion: expected {', '.join(SHELLS)}, found {shell!r}.")
    if find_spec("shtab") is None:
        raise ConfigError(
            "completion: needs the package shtab. Install it: pip install 'sdsearch_lightning[completion]'."
        )
    import shtab

    parser = argparse.ArgumentParser("sdsearch")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        for key in keys_of(name, run):
            option = command.add_argument(f"--{key}")
            if key in FILES:
                option.complete = shtab.FILE  # type: ignore[attr-defined]
    script: str = shtab.complete(parser, shell)
    return script


def keys_of(command: str, run: Callable[[Sequence[str]], object]) -> list[str]:
    """The keys that a command's help lists, in its order."""
    said = io.StringIO()
    with redirect_stdout(said), suppress(SystemExit):
        run([command, "--help"])
    return list(dict.fromkeys(key for key in _KEY.findall(said.getvalue()) if _NAME.fullmatch(key) and key != "help"))
