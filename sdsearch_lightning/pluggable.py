"""The one rule for users' own classes: what counts is what they can do, not what they derive from."""

from __future__ import annotations

from abc import ABC
from inspect import getattr_static, isfunction
from types import MethodType
from typing import ClassVar, TypeVar

from sdsearch_lightning.errors import ConfigError

Found = TypeVar("Found")


class Pluggable(ABC):  # noqa: B024  (its subclasses say what is abstract)
    """A base class that also accepts look-alikes: any class with the `required` methods counts as a subclass.

    jsonargparse then takes a user's unannotated class by `class_path`; the real check is a probe call at start.

    Example:
        >>> class Echo(Pluggable):
        ...     required, optional = ("say",), ("shout",)
        ...     def shout(self, text): return self.say(text).upper()
        >>> class Mine:
        ...     def say(self, text): return text
        >>> isinstance(Mine(), Echo), Echo.adopt(Mine()).shout("hey")
        (True, 'HEY')
    """

    required: ClassVar[tuple[str, ...]] = ()
    """Methods that make a class a look-alike."""
    optional: ClassVar[tuple[str, ...]] = ()
    """What a look-alike may lack: methods and attributes with a default here."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        required = cls.__dict__.get("required", ())
        return bool(required) and all(callable(getattr(other, name, None)) for name in required) or NotImplemented

    @classmethod
    def adopt(cls, found: Found) -> Found:
        """`found`, given this class's own defaults of the `optional` names that it lacks.

        Called once, where a user's object is accepted; everything behind that place calls plainly.

        Raises:
            ConfigError: the object cannot be given anything.
        """
        for name in cls.optional:
            if hasattr(found, name):
                continue
            default = getattr_static(cls, name)
            try:
                object.__setattr__(found, name, MethodType(default, found) if isfunction(default) else default)
            except AttributeError as error:
                raise ConfigError(
                    f"{type(found).__name__} lacks {name!r} and can be given none, since it has __slots__. Derive it "
                    f"from {cls.__name__}, or write {name!r}."
                ) from error
        return found
