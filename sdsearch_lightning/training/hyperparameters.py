"""The arguments that a module was made with, for loggers, and for `load_from_checkpoint` as far as they are plain."""

from __future__ import annotations

import inspect
from dataclasses import asdict, is_dataclass
from types import FrameType
from typing import Any

PLAIN = (str, int, float, bool, type(None))


def given_arguments(module: object) -> dict[str, Any]:
    """Arguments of the outermost `__init__` of `module` that is running, those of `*args` left out.

    Lightning's `save_hyperparameters` would copy objects, and put them into checkpoints as pickles.
    """
    frame: FrameType | None = inspect.currentframe()
    found: dict[str, Any] = {}
    while frame is not None:
        info = inspect.getargvalues(frame)
        if frame.f_code.co_name == "__init__" and info.args and info.locals[info.args[0]] is module:
            found = {name: info.locals[name] for name in [*info.args[1:], *_keyword_only(frame)]}
            found |= info.locals[info.keywords] if info.keywords else {}
        frame = frame.f_back
    return found


def _keyword_only(frame: FrameType) -> tuple[str, ...]:
    code = frame.f_code
    return code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those that a checkpoint can hold as they are: numbers, texts, and lists of them."""
    return {name: value for name, value in arguments.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, list) and all(map(_is_plain, value)))


def told_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """All of them in words of a logger: fields of dataclasses, and names of the classes of other objects."""
    return {name: _told(value) for name, value in arguments.items()}


def _told(value: Any) -> Any:
    if _is_plain(value):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {name: _told(part) for name, part in asdict(value).items()}
    return getattr(value, "__qualname__", type(value).__qualname__)
