"""Which library searches: FAISS where it can be imported, else torch."""

from __future__ import annotations

import warnings
from functools import cache

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.retrieval.faiss_library import import_faiss, installed_wheels

BACKENDS = ("auto", "faiss", "faiss-gpu", "torch")


def choose_backend(backend: str, factory: str = "Flat") -> str:
    """Who writes the file, "faiss" or "torch", for a name of `BACKENDS` and a FAISS factory string.

    Raises:
        ConfigError: an unknown name; FAISS where it cannot be imported (the message holds the repair); torch with a
            factory that it does not know.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, found {backend!r}.")
    if backend == "auto":
        try:
            import_faiss()
            return "faiss"
        except ConfigError as error:
            if factory != "Flat":
                raise
            if installed_wheels():  # installed, but broken: say so
                _warn_once(f"{error}. Until then torch searches, exactly too.")
            return "torch"
    if backend == "torch":
        if factory != "Flat":
            raise ConfigError(f"factory: expected Flat with backend 'torch', which is exact, found {factory!r}.")
        return "torch"
    import_faiss()
    return "faiss"


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
