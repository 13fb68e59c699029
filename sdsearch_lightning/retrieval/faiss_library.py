"""The one place that imports faiss, which two wheels provide that overwrite each other."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from sdsearch_lightning.errors import ConfigError


@cache
def import_faiss() -> ModuleType:
    """The faiss module.

    Raises:
        ConfigError: it is not installed, or two wheels have overwritten each other; the message holds the repair.
    """
    reason: Exception | str
    try:
        import faiss

        if hasattr(faiss, "IndexFlatIP"):
            return faiss
        reason = "the package is an empty husk"  # what an uninstall of one of two wheels leaves
    except (ImportError, RuntimeError) as error:  # RuntimeError: faiss-gpu without the CUDA libraries
        reason = error
    wheels = installed_wheels()
    if len(wheels) == 2:
        repair = "faiss-cpu and faiss-gpu overwrite each other; keep one: "
        repair += "pip uninstall -y faiss-cpu faiss-gpu && pip install faiss-cpu"
    elif wheels:
        repair = f"Reinstall it: pip uninstall -y {wheels[0]} && pip install {wheels[0]}"
    else:
        repair = "Install it: pip install faiss-cpu (or faiss-gpu, never both)"
    raise ConfigError(f"FAISS cannot be used ({reason}). {repair}")


def installed_wheels() -> list[str]:
    """Which of faiss-cpu and faiss-gpu pip believes to be there."""
    wheels = []
    for wheel in ("faiss-cpu", "faiss-gpu"):
        try:
            version(wheel)
        except PackageNotFoundError:
            continue
        wheels.append(wheel)
    return wheels
