"""The one rule for users' own classes: what counts is what they can do, not what they derive from."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar


class Pluggable(ABC):  # noqa: B024  (its subclasses say what is abstract)
    """A base class that also accepts look-alikes: any class with the `required` methods counts as a subclass.

    jsonargparse then takes a user's unannotated class by `class_path`; the real check is a probe call at start.
    """

    required: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        required = cls.__dict__.get("required", ())
        return bool(required) and all(callable(getattr(other, name, None)) for name in required) or NotImplemented
