"""A callback that has secrets of every kind."""

from __future__ import annotations

from jsonargparse.typing import SecretStr
from lightning.pytorch import Callback


class Caller(Callback):
    """Takes a token by name, a password in a URL, and a parameter that its type marks."""

    def __init__(self, url: str, token: str | None = None, phrase: SecretStr | None = None) -> None:
        self.url, self.token, self.phrase = url, token, phrase
