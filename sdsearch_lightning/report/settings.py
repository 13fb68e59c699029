"""config.yaml of a run as reports show it: whole, its main settings, and where runs differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.report.example import printable
from sdsearch_lightning.trust.secrets import without_secrets

MAIN = (
    "seed_everything",
    "model.model_name_or_path",
    "model.optimizer.init_args.lr",
    "model.teacher_use",
    "data.class_path",
    "data.init_args.batch_size",
    "trainer.max_steps",
    "rollout.group_size",
    "rollout.max_searches",
    "rollout.top_k",
    "rollout.reward",
    "rollout.credit",
    "hindsight.block",
    "hindsight.groups",
    "jsd.weight",
    "jsd.warmup_steps",
    "credit.weight",
)
"""Shown first, in this order. A class shows its name, with its settings where it has some."""
NAMES = ("run.name", "run.root", "run.overwrite")
"""Keys in which any two runs differ."""


@dataclass(frozen=True, slots=True)
class Settings:
    """A run's configuration; empty where the run has no config.yaml."""

    text: str = ""
    """As YAML, without secrets."""
    flat: Mapping[str, str] = field(default_factory=dict)
    """Value of every key, dotted."""
    main: Sequence[tuple[str, str]] = ()


def read_settings(run_folder: Path) -> Settings:
    """The configuration of a run.

    Raises:
        DataError: config.yaml is no YAML, or no mapping.
    """
    path = run_folder / "config.yaml"
    if not path.is_file():
        return Settings()
    try:
        found = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise DataError(f"{path}: expected YAML ({printable(str(error))[:120]}). Restore it or remove it.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a mapping, got {type(found).__name__}. Restore it or remove it.")
    config = without_secrets(found)
    return Settings(
        text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=110),
        flat=dict(_flat(config)),
        main=[(key, _main(key, value)) for key in MAIN if (value := _at(config, key)) is not None],
    )


def differences(settings: Sequence[Settings]) -> list[tuple[str, list[str]]]:
    """Keys whose values differ between runs, and the value of each; `-` where a run has no such key."""
    keys = dict.fromkeys(key for one in settings for key in one.flat if key not in NAMES)
    rows = [(key, [one.flat.get(key, "-") for one in settings]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, _shown(value)


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return config


def _main(key: str, value: Any) -> str:
    return _shown({"class_path": value} if key.endswith(".class_path") else value)


def _shown(value: Any) -> str:
    """A value on one line, as one would type it; a class by its last name."""
    if isinstance(value, dict) and isinstance(value.get("class_path"), str):
        arguments = {key: inner for key, inner in (value.get("init_args") or {}).items() if inner is not None}
        inner = ", ".join(f"{key}={_shown(argument)}" for key, argument in arguments.items())
        name = value["class_path"].rpartition(".")[2]
        return printable(f"{name}({inner})" if inner else name)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return printable(str(value))
