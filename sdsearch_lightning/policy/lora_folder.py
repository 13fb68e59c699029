"""Folders of LoRA adapters, as peft writes and reads them, and the base model that an adapter is bound to.

    adapter_config.json  adapter_model.safetensors      what peft knows
    sdsearch_origin.json                                ours: name and fingerprint of the base

Invariant: an adapter is put on the base that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdsearch_lightning.errors import ConfigError, reading_foreign

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LEARNED = "default"
"""peft's name of the adapter that learns."""
CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "sdsearch_origin.json"
SAMPLES = 64
"""Values of each weight that go into a fingerprint."""
_UNSUPPORTED = {"bias": "none", "modules_to_save": None, "use_dora": False, "layer_replication": None,
                "megatron_config": None}  # fmt: skip
"""Options of peft that would train or change more than low-rank factors, or import a module by its name (Megatron's);
and their values without effect."""


def need_peft() -> None:
    """Raise ConfigError where peft is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("model.lora needs peft, which is not installed: pip install 'sdsearch-lightning[lora]'")


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that tell base models apart; take it before anything is added to the model.

    It covers the model type, the numbers of heads, the names and shapes of all weights, and 64 values of each, spread
    evenly and rounded to bfloat16: so it does not depend on the dtype that the weights are loaded in. Two models that
    differ elsewhere only (a tokenizer, a rope base, single weights) have the same one.
    """
    digest = hashlib.blake2b(digest_size=8)
    config: Any = model.config
    facts = (getattr(config, name, None) for name in ("model_type", "num_attention_heads", "num_key_value_heads"))
    digest.update(repr(tuple(facts)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(weight.shape)}".encode())
        values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)][:SAMPLES]
        digest.update(values.float().bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def write_adapter(model: PreTrainedModel, folder: Path, origin: Mapping[str, Any], base: str | None) -> None:
    """Write the adapter that learns as a folder that `peft.PeftModel.from_pretrained` loads.

    Args:
        model: with adapters.
        folder: to write.
        origin: name and fingerprint of the base.
        base: where the base can be loaded from; None where it is nowhere.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # Left to itself, peft asks the hub whether the vocabulary has grown.
    weights = get_peft_model_state_dict(model, adapter_name=LEARNED, save_embedding_layers=False)
    named = {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy(model.peft_config[LEARNED])
    config.base_model_name_or_path, config.task_type, config.inference_mode = base, "CAUSAL_LM", True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(folder)
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> Any:
    """The LoraConfig of an adapter folder, without dropout.

    Raises:
        ConfigError: no such folder, an unfinished one, or an adapter of a kind that is not trained here.
    """
    from peft import PeftConfig

    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise ConfigError(
            f"model.lora.adapter: expected a folder of a peft adapter, found no {' and no '.join(missing)} in {folder}."
        )
    with reading_foreign(f"model.lora.adapter: {folder / CONFIG} cannot be read"):
        config = PeftConfig.from_pretrained(str(folder))
    odd = [name for name, value in _UNSUPPORTED.items() if (getattr(config, name, value) or value) != value]
    if config.peft_type != "LORA" or odd:
        found = f"peft_type {config.peft_type}" if config.peft_type != "LORA" else f"{odd[0]} {getattr(config, odd[0])}"
        raise ConfigError(f"model.lora.adapter: expected a plain LoRA adapter in {folder}, found one with {found}.")
    config.lora_dropout, config.inference_mode = 0.0, False
    return config


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give the adapter that learns the weights of a folder.

    Raises:
        ConfigError: they do not fit the model.
    """
    from peft import load_peft_weights, set_peft_model_state_dict
    from safetensors import SafetensorError

    try:
        weights = load_peft_weights(str(folder), device="cpu")
        outcome = set_peft_model_state_dict(model, weights, adapter_name=LEARNED)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        reason = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ConfigError(f"model.lora.adapter: the weights in {folder} do not fit the model: {reason}") from error
    missing = [name for name in outcome.missing_keys if f".{LEARNED}." in name or name.endswith(f".{LEARNED}")]
    if wrong := [*missing, *outcome.unexpected_keys]:
        which = "lacks" if missing else "has, beyond the model's,"
        raise ConfigError(f"model.lora.adapter: {folder} {which} {wrong[0]}. Is it an adapter of another model?")


def check_base(folder: Path, mine: Mapping[str, Any]) -> str | None:
    """Whether an adapter folder belongs to a base.

    Args:
        folder: of the adapter.
        mine: name and fingerprint of the base that is loaded.

    Returns:
        A doubt: the folder has no fingerprint, and another name.

    Raises:
        ConfigError: it has another fingerprint.
    """
    path = folder / ORIGIN
    if path.is_file():
        with reading_foreign(f"model.lora.adapter: expected name and base in {path}"):
            theirs = {key: str(json.loads(path.read_text(encoding="utf-8"))[key]) for key in ("name", "base")}
        if theirs["base"] != mine["base"]:
            raise ConfigError(f"model.lora.adapter: {folder} {other_base(theirs, mine)}")
        return None
    name = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if name in (None, mine["name"]):
        return None
    return f"model.lora.adapter: {folder} was trained on {name}, and the model here is {mine['name']}; is it the same?"


def other_base(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """What is told of an adapter that was trained on another base."""
    return (
        f"was trained on another base, {theirs['name']} (fingerprint {theirs['base']}); the model here is "
        f"{mine['name']} ({mine['base']}).\nAn adapter is worth nothing on another model: name its own as "
        "model.model_name_or_path."
    )
