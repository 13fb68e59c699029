"""The architecture that a run's model has, from its configuration alone: no weights are read.

Looked for in this order: `--model_config`; a local folder; the files of configs/experiment/recipe/architectures/, by
the last part of the model's name, less -Instruct; and the Hugging Face hub or its cache.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.plan.probe import MakeModel
from sdsearch_lightning.policy.loading import SAFE

KNOWN = Path(__file__).parents[2] / "configs/experiment/recipe/architectures"
"""Of a checkout; an installed package has none."""


def find_architecture(name: str | None, given: str | None) -> tuple[MakeModel, str]:
    """What makes the model without weights, and where its shape came from.

    Args:
        name: model.model_name_or_path; None for a model.scratch.
        given: a config.json, or a folder with one, that stands in for the model's.

    Raises:
        ConfigError: there is no configuration to be had, or none of a causal LM.
    """
    if name is None and given is None:
        raise ConfigError(
            "model.scratch: plan expected a shape from model.model_name_or_path or --model_config <config.json>, found "
            "neither: a scratch model's vocabulary comes from its data, which plan does not read."
        )
    config, source = _find(name or "", given)

    def make(dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **SAFE)

    try:
        with torch.device("meta"):
            make(torch.float32)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: cannot make a causal LM of it: {str(error).splitlines()[0]}") from error
    return make, source


def _find(name: str, given: str | None) -> tuple[Any, str]:
    if given is not None:
        return _read(Path(given).expanduser(), "model_config"), given
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _read(folder, "model.model_name_or_path"), name
    known = KNOWN / f"{name.rpartition('/')[2].removesuffix('-Instruct')}.json"
    if known.is_file():
        return _read(known, "model.model_name_or_path"), f"architectures/{known.name}"
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries, where there is no network
    try:
        return AutoConfig.from_pretrained(name, **SAFE), name
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.model_name_or_path: {name!r} is no local folder, none of {KNOWN.name}/ and not to be had from the "
            "hub. Give its shape: --model_config <config.json>."
        ) from error


def _read(path: Path, option: str) -> Any:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{option}: expected a config.json, or a folder with one, found none at {path}.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{option}: expected the configuration of a model with a model_type in {file}.") from error
