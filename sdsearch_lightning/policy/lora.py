"""LoRA: the policy learns through low-rank adapters; the model beneath them, the base, stays as it was loaded.

    y = W x + (lora_alpha / r) * B A x                                                       (arXiv:2106.09685)

peft makes the layers, inside of the ordinary model, so everything that finds its way through a model by name (decoder,
output layer, attention) still does. There is no dropout: the policy that trains has to be the one that sampled. The
base needs no copy to be the reference of the KL: a pass with the adapter switched off is that of the initial model.

Invariant: nothing here writes a weight of the base.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.losses.logprobs import wide_dtype
from sdsearch_lightning.policy.head import Outcome, Reading
from sdsearch_lightning.policy.lora_folder import LEARNED, check_base, need_peft, read_config, read_weights
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INITIAL = "initial"
"""Name of the frozen adapter that training began with, where it began with one."""
IDLE_WARNINGS = (
    "fan_in_fan_out is set to",  # peft finds out by itself, and says so
    "Model has `tie_word_embeddings=True`",  # refused in `_check_layers`
    "Already found a `peft_config` attribute",  # the second one is `INITIAL`
)


@dataclass
class LoRA:
    """Low-rank adapters; names and meanings are peft's."""

    r: int = 16
    """Rank of the two factors, at least 1."""
    lora_alpha: float = 32
    """The product of the factors is scaled by lora_alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Layers with an adapter: all-linear (all but the output layer), a list of name ends, or a regular expression."""
    adapter: str | None = None
    """Folder of a peft adapter to go on from; the other three are then the adapter's own. null: a new one."""

    def __post_init__(self) -> None:
        if self.r < 1 or not self.lora_alpha > 0:
            raise ConfigError(
                f"model.lora: expected r of at least 1 and lora_alpha above 0, found {self.r} and {self.lora_alpha}."
            )


def is_learned(name: str) -> bool:
    """Whether a weight of this name belongs to the adapter that learns."""
    return "lora_" in name and LEARNED in name.split(".")


def add_adapter(model: PreTrainedModel, lora: LoRA, seed: int, origin: Mapping[str, Any]) -> None:
    """Put an adapter on a model, in place; all other weights are frozen.

    A new adapter changes nothing yet (B is 0). Its weights are in float32, or float64 where the model's are: an update
    of 1e-6 is lost in bfloat16.

    Args:
        model: without adapters.
        lora: what to add.
        seed: of the factors A.
        origin: name and fingerprint of the model.

    Raises:
        ConfigError: peft is not installed, no layer has such a name, one cannot be adapted, or the adapter to go on
            from cannot be put on this model.
    """
    need_peft()
    config = _new_config(lora) if lora.adapter is None else _given_config(lora, Path(lora.adapter).expanduser())
    _inject(model, config, LEARNED, seed)
    _check_layers(model)
    wide = wide_dtype(model.dtype)
    for name, weight in model.named_parameters():
        if is_learned(name):
            weight.data = weight.data.to(wide)
    if lora.adapter is not None and model.device.type != "meta":  # without values, it will get another rank's
        folder = Path(lora.adapter).expanduser()
        if doubt := check_base(folder, origin):
            warnings.warn(doubt, stacklevel=2)
        read_weights(model, folder)


def _new_config(lora: LoRA) -> Any:
    from peft import LoraConfig

    targets = lora.target_modules
    return LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")


def _given_config(lora: LoRA, folder: Path) -> Any:
    """The configuration of the adapter to go on from, checked against what the user asked for."""
    config = read_config(folder)
    for field in fields(LoRA)[:3]:
        wanted, found = getattr(lora, field.name), getattr(config, field.name)
        same = set(wanted) == set(found) if not isinstance(wanted, str | float | int) else wanted == found
        if wanted != field.default and not same:
            raise ConfigError(
                f"model.lora.{field.name}: the adapter in {folder} has {found}, found {wanted}. Leave it out, or "
                "start a new adapter without model.lora.adapter."
            )
    return config


def _inject(model: PreTrainedModel, config: Any, name: str, seed: int) -> None:
    with torch.random.fork_rng(), warnings.catch_warnings():
        for told in IDLE_WARNINGS:
            warnings.filterwarnings("ignore", told)
        torch.manual_seed(seed)
        ends = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _has_matrix(part)})
        try:
            model.add_adapter(config, name)
        except ValueError as error:
            raise ConfigError(
                f"model.lora.target_modules: {str(error).splitlines()[0]}\nLayers of this model: {', '.join(ends)}."
            ) from error


def _has_matrix(part: nn.Module) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


def _check_layers(model: PreTrainedModel) -> None:
    """Refuse layers whose adapter could not be merged into their weight."""
    from peft.tuners import lora

    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, layer in _layers(model).items():
        if not isinstance(layer, lora.Linear | lora.Embedding):
            raise ConfigError(f"model.lora.target_modules: {name} is no linear layer and no embedding. Leave it out.")
        if uses[id(layer.base_layer.weight)] > 1:
            raise ConfigError(
                f"model.lora.target_modules: {name} shares its weight with another layer (tie_word_embeddings), which "
                "an adapter would part. Leave it out."
            )


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers that hold adapters, by their name in the model."""
    from peft.tuners.lora import LoraLayer

    return {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}


class Reference:
    """The policy as it was when training began, without a copy: a pass of the policy itself, its learning set aside.

    Passes go through the policy's own forward, so it may be wrapped or sharded.

    Args:
        policy: with adapters; where training goes on from an adapter, that one is kept beside the one that learns.
        lora: what was put on it.
    """

    def __init__(self, policy: Policy, lora: LoRA) -> None:
        self._policy = policy
        if lora.adapter is not None:
            _keep_initial(policy.model)

    def __call__(self, sequences: PackedSequences, readings: Sequence[Reading]) -> Outcome:
        """See `Policy.forward`; no gradient reaches what learns."""
        with _active(self._policy.model, INITIAL):
            outcome: Outcome = self._policy(sequences, readings)
        return outcome


def _keep_initial(model: PreTrainedModel) -> None:
    """Add a frozen copy of the adapter; the other one stays the one in use."""
    _inject(model, copy(model.peft_config[LEARNED]), INITIAL, seed=0)
    model.set_adapter(LEARNED)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if "lora_" in name and INITIAL in name.split("."):
            weight.requires_grad_(False)
            learned = weights[name.replace(f".{INITIAL}", f".{LEARNED}")].detach()
            # Without values it will get another rank's.
            weight.data = weight.data.to(learned.dtype) if learned.is_meta else learned.clone()


@contextmanager
def _active(model: nn.Module, name: str) -> Iterator[None]:
    """Run passes with the adapter of this name; with none where no layer has it.

    peft's own switches would turn gradients of the adapter that learns off and on again, between the passes of one
    update, where DDP and FSDP2 count on them. So this sets what they set besides.
    """
    layers = list(_layers(model).values())
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, adapters in zip(layers, before, strict=True):
            layer._active_adapter = adapters


def plain_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights as they are without adapters, what these have learned added to them; one at a time, none is written.

    The sum is taken in the adapter's dtype and rounded to the base's once.

    Args:
        model: with adapters or without; a model without gives back `weights`.
        weights: of `model` by name: its parameters, its state, or its state gathered from shards.
    """
    layers = _layers(model) if hasattr(model, "peft_config") else {}
    for name, weight in weights.items():
        if layers and "lora_" in name:
            continue
        owner, is_base, leaf = name.rpartition(".base_layer.")
        if owner in layers and leaf == "weight":
            change = _change(layers[owner], owner, weights)
            weight = (_whole(weight).to(change.dtype) + change).to(weight.dtype)
        yield (f"{owner}.{leaf}" if is_base and layers else name), _whole(weight)


def _change(layer: Any, owner: str, weights: Mapping[str, Tensor]) -> Tensor:
    """What an adapter adds to the weight of its layer."""
    end, place = f"{LEARNED}.weight", "lora"
    if f"{owner}.lora_embedding_A.{LEARNED}" in weights:
        end, place = LEARNED, "lora_embedding"
    first, second = (_whole(weights[f"{owner}.{place}_{factor}.{end}"]).detach() for factor in "AB")
    change: Tensor = (second @ first) * layer.scaling[LEARNED]
    return change.T if place == "lora_embedding" or layer.fan_in_fan_out else change


def _whole(weight: Tensor) -> Tensor:
    """A sharded weight knows how to become whole, on all ranks together."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


@contextmanager
def without_layers(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` is built as if it had never had adapters; their layers come back as they were."""
    layers = _layers(model) if hasattr(model, "peft_config") else {}
    for name, layer in layers.items():
        _put(model, name, layer.base_layer)
    has_adapters, model._hf_peft_config_loaded = model._hf_peft_config_loaded, False
    try:
        yield
    finally:
        model._hf_peft_config_loaded = has_adapters
        for name, layer in layers.items():
            _put(model, name, layer)


def _put(model: nn.Module, name: str, part: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, part)
