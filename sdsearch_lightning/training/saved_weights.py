"""Weights on their way out of a module and into one: the Hugging Face folder, and the check of a checkpoint.

Invariant: a module takes no other model's weights, and an adapter only on the base that it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy import loading
from sdsearch_lightning.policy.lora import plain_weights, without_layers
from sdsearch_lightning.policy.lora_folder import other_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def write_model_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer as a Hugging Face folder; what adapters have learned is merged into the weights.

    Args:
        model: with or without adapters.
        tokenizer: its.
        path: the folder.
        weights: the model's whole weights, where they are sharded.
    """
    state = weights or model.state_dict()
    # What is merged is new: it need not lie beside the weights on the device.
    plain = {name: w if w is state.get(name) else w.cpu() for name, w in plain_weights(model, state)}
    with without_layers(model):
        model.save_pretrained(path, state_dict=plain)
    tokenizer.save_pretrained(path)


def check_base(facts: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise ConfigError where a checkpoint holds an adapter of another base.

    Args:
        facts: what the checkpoint holds besides weights.
        mine: `PolicyModule.origin`; it has a base where there are adapters.
    """
    theirs = _origin(facts)
    if "base" in mine and theirs.get("base", mine["base"]) != mine["base"]:
        raise ConfigError(f"ckpt_path: this adapter {other_base(theirs, mine)}")


def check_model(
    facts: Mapping[str, Any],
    mine: Mapping[str, Any],
    found: Mapping[str, torch.Size],
    wanted: Mapping[str, torch.Size],
) -> None:
    """Raise ConfigError where a checkpoint belongs to another model.

    Args:
        facts: what the checkpoint holds besides weights.
        mine: `PolicyModule.origin`.
        found: shapes of the checkpoint's weights, by name.
        wanted: shapes of the weights that are asked of it.
    """
    check_base(facts, mine)
    difference = loading.first_difference(found, wanted)
    if difference is not None:
        raise ConfigError(
            f"ckpt_path: this checkpoint of {_origin(facts)['name']} does not fit the model {mine['name']}: "
            f"{difference}.\nName the model that was trained, or a checkpoint of this one."
        )


def _origin(facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name (and base) of the model whose weights a checkpoint holds."""
    origin: Mapping[str, Any] = facts.get("origin", {"name": "an unnamed model"})
    return origin
