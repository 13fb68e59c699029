"""What of a module goes into a checkpoint, what comes out of one, and the Hugging Face folder of its weights.

Invariant: a checkpoint holds what a resumed run cannot make again, and takes no other model's weights.

Next: policy_module.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy import loading as models
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.lora import LoRA, is_learned, plain_weights, without_layers
from sdsearch_lightning.policy.lora_folder import other_base, write_adapter
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.training.fsdp2 import whole_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PolicyCheckpoints(pl.LightningModule):
    """Base of `PolicyModule`."""

    model_name_or_path: str | None
    scratch: ScratchModel | None
    lora: LoRA | None
    base_fingerprint: str
    """Of the model beneath the adapters; there once it is loaded, with adapters only."""
    policy: Policy
    tokenizer: PreTrainedTokenizerBase

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's weights for `save_pretrained`; a collective under fsdp2."""
        return whole_weights(self.policy.model)

    def save_pretrained(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write model and tokenizer as a Hugging Face folder; what adapters have learned is merged into the weights.

        Args:
            path: the folder.
            weights: from `whole_weights`, where they are sharded.
        """
        model = self.policy.model
        state = weights or model.state_dict()
        # What is merged is new: it need not lie beside the weights on the device.
        plain = {name: w if w is state.get(name) else w.cpu() for name, w in plain_weights(model, state)}
        with without_layers(model):
            model.save_pretrained(path, state_dict=plain)
        self.tokenizer.save_pretrained(path)

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter as a folder that peft loads, with the tokenizer.

        Raises:
            ConfigError: there is none.
        """
        if self.lora is None:
            raise ConfigError("adapter: this run trained all weights: it has no adapter. Leave --adapter out.")
        write_adapter(self.policy.model, Path(path), self.origin, self.model_name_or_path)
        self.tokenizer.save_pretrained(path)

    def is_saved(self, name: str) -> bool:
        """Whether checkpoints hold the weight of this name; what a run makes again when it starts stays out."""
        return self.lora is None or is_learned(name)

    @property
    def origin(self) -> dict[str, Any]:
        """What a checkpoint tells of the model that its weights belong to: its name, with adapters its fingerprint."""
        name = self.model_name_or_path or f"scratch {self.scratch.model_type if self.scratch else ''}"
        return {"name": name} | ({"base": self.base_fingerprint} if self.lora is not None else {})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what a resumed run makes again, and say whose weights these are."""
        checkpoint["origin"] = self.origin
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if self.is_saved(k)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model; keep what checkpoints do not hold as it was made."""
        if "state_dict" not in checkpoint:  # under fsdp2, whose strategy has taken the weights already
            self.check_base(checkpoint)
            return
        mine = self.state_dict()
        self.check_checkpoint(checkpoint, {k: v.shape for k, v in checkpoint["state_dict"].items()}, mine)
        checkpoint["state_dict"] |= {k: v for k, v in mine.items() if not self.is_saved(k)}

    def check_base(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """Origin of a checkpoint's weights; raises ConfigError where they are an adapter of another base."""
        theirs: Mapping[str, Any] = facts.get("origin", {"name": "an unnamed model"})
        if self.lora is not None and theirs.get("base", self.base_fingerprint) != self.base_fingerprint:
            raise ConfigError(f"ckpt_path: this adapter {other_base(theirs, self.origin)}")
        return theirs

    def check_checkpoint(
        self, facts: Mapping[str, Any], found: Mapping[str, torch.Size], wanted: Mapping[str, Tensor]
    ) -> None:
        """Raise ConfigError where a checkpoint belongs to another model.

        Args:
            facts: what it holds besides weights.
            found: shapes of its weights, by name.
            wanted: weights of this module that are asked of it; those that are not saved do not count.
        """
        theirs, mine = self.check_base(facts), self.origin["name"]
        difference = models.first_difference(found, {k: v.shape for k, v in wanted.items() if self.is_saved(k)})
        if difference is not None:
            raise ConfigError(
                f"ckpt_path: this checkpoint of {theirs['name']} does not fit the model {mine}: {difference}.\n"
                "Name the model that was trained, or a checkpoint of this one."
            )
