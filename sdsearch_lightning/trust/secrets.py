"""Tokens and passwords of a configuration: told by name, read from elsewhere, left out of what is written.

    token: env:SDSEARCH_TOKEN            the environment variable
    token: file:/run/secrets/sdsearch    the text of a file
    token: abc                           itself; it works, and is written nowhere

Invariant: `without_secrets` of a configuration holds no value of a key that `names_secret`, and no password of a URL.
A class of one's own marks a parameter by such a name, or by the type `jsonargparse.typing.SecretStr`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdsearch_lightning.errors import ConfigError

SECRET = "<secret>"
"""Stands where one was."""
_NAME = re.compile(
    r"(?:.*[_-])?(?:password|passwd|passphrase|secret|secrets|credentials?|api_?key|(?:access|secret|private)[_-]key"
    r"|authorization|cookie)|(?:(?:api|access|auth|bearer|refresh|hf|hub|client)[_-])?token",
    re.IGNORECASE,
)
_REFERENCE = re.compile(r"(env|file):(.+)")
_USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/?#\s'\"]*@", re.IGNORECASE)
_IN_QUERY = re.compile(r"([?&](?:token|api_?key|key|password|secret|access_token)=)[^&#\s'\"]+", re.IGNORECASE)


def names_secret(key: str) -> bool:
    """Whether a key (its last part, where it has dots) says that its value is a secret; `max_tokens` does not."""
    return _NAME.fullmatch(key.rpartition(".")[2]) is not None


def without_secrets(value: Any, key: str = "") -> Any:
    """The same without secrets: `<secret>` in place of those told by name, and URLs without user and password.

    Args:
        value: a configuration, a part of it, or a text to show.
        key: that it stands under. What only says where a secret is to be found stays.
    """
    if names_secret(key) and value not in (None, "") and not isinstance(value, bool):
        return value if isinstance(value, str) and _REFERENCE.fullmatch(value) else SECRET
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        return _IN_QUERY.sub(rf"\1{SECRET}", _USER.sub(r"\1", value))
    return value


def read_secret(value: str | None, key: str) -> str | None:
    """The secret that an option means; call it where it is used, so that the object itself does not hold it.

    Args:
        value: of the option.
        key: its name, for the message, which never tells the value.

    Raises:
        ConfigError: there is no such variable or file, or a saved configuration is used without its secrets.
    """
    if value == SECRET:
        raise ConfigError(
            f"{key}: expected a secret, found {SECRET}: the configuration was saved without. Set {key} to env:VARIABLE "
            "or file:PATH."
        )
    if value is None or (found := _REFERENCE.fullmatch(value)) is None:
        return value
    kind, name = found.groups()
    try:
        secret = os.environ[name] if kind == "env" else Path(name).expanduser().read_text(encoding="utf-8").strip()
    except (KeyError, OSError, UnicodeDecodeError) as error:
        what = f"the environment variable {name}" if kind == "env" else f"a text file {name}"
        raise ConfigError(f"{key}: expected {what}, found none. Set it, or leave {key} out.") from error
    if not secret:
        raise ConfigError(f"{key}: expected a secret in {name}, found nothing. Set it, or leave {key} out.")
    return secret
