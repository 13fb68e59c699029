"""What the reinforcement-learning module and the cold start share: model, tokenizer, optimizers, and the manual step.

A *step* is one batch of the loader wherever a user counts: `trainer.max_steps`, `global_step`, checkpoints and the
logger's axis all count batches, however many optimizers there are and however many updates one batch gets.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy import loading
from sdsearch_lightning.policy.compiling import compile_layers
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.lora import LoRA, add_adapter, is_learned
from sdsearch_lightning.policy.lora_folder import fingerprint, write_adapter
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.templates import PROTOCOLS, Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec, end_of_turn_ids
from sdsearch_lightning.schedules import Constant, Schedule
from sdsearch_lightning.training.fsdp2 import shard, whole_weights
from sdsearch_lightning.training.hyperparameters import given_arguments, plain_arguments, told_arguments
from sdsearch_lightning.training.manual_step import ManualStep
from sdsearch_lightning.training.master_weights import BFloat16Weights, MasterWeights
from sdsearch_lightning.training.options import Compute, DtypeName, OptimizerSpec, ProtocolName
from sdsearch_lightning.training.saved_weights import check_base, check_model, write_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PolicyModule(ManualStep):
    """Base of both modules; `__init__` is light, the model is built in `configure_model`.

    Args:
        model_name_or_path: Hugging Face folder or hub name of a causal LM with its tokenizer; null where model.scratch
            is given.
        optimizers: at least one; together they take every parameter, each entry those that no entry before it took.
        scratch: a new model with random weights instead; its word-level tokenizer is made of the data module's
            vocabulary. null: load model_name_or_path.
        protocol: texts of prompt, tags and observations: search_r1, autorefine, or a class of your own.
        lr_schedule: factor on every learning rate, by step.
        gradient_clip_val: gradients are clipped to this norm; null turns it off. (The trainer's own clipping does not
            work with manual optimisation.)
        max_micro_batch_tokens: tokens of one forward and backward pass; bounds memory, never changes a loss.
        compute: how a pass is run.
        dtype: number format that weights are loaded in. float32 unless you know better: an update of 1e-6 is lost in
            bfloat16 weights.
        seed: of random weights and adapters; linked to seed_everything.
        lora: learn through low-rank adapters and leave the model as it is; needs the extra `lora`. null: train all
            weights.
        eos_tokens: tokens that end a turn; null: the tokenizer's end of text, those of the model's generation config,
            and what the chat template closes a turn with.
    """

    learns_from = "questions"
    model_name_or_path: str | None
    base_fingerprint: str
    """Of the model beneath the adapters; there once it is loaded, with adapters only."""
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        model_name_or_path: str | None = None,
        *,
        optimizers: Sequence[OptimizerSpec],
        scratch: ScratchModel | None = None,
        protocol: Protocol | ProtocolName = "autorefine",
        lr_schedule: Schedule = Constant(),  # noqa: B008  (stateless)
        gradient_clip_val: float | None = 1.0,
        max_micro_batch_tokens: int = 32768,
        compute: Compute = Compute(),  # noqa: B008  (frozen)
        dtype: DtypeName = "float32",
        seed: int = 0,
        lora: LoRA | None = None,
        eos_tokens: list[str] | None = None,
    ) -> None:
        super().__init__()
        given = given_arguments(self) | {"model_name_or_path": model_name_or_path}
        self._set_hparams(plain_arguments(given))  # what a checkpoint tells `load_from_checkpoint`
        self._hparams_initial, self._log_hyperparams = told_arguments(given), True  # what loggers are told
        self.automatic_optimization = False
        if (model_name_or_path is None) == (scratch is None):
            raise ConfigError(
                "model: expected either model_name_or_path (a Hugging Face folder or name) or scratch (a new model), "
                f"found {'neither' if scratch is None else 'both'}."
            )
        if max_micro_batch_tokens < 1:
            raise ConfigError(f"model.max_micro_batch_tokens: expected at least 1, found {max_micro_batch_tokens}.")
        if isinstance(protocol, str) and protocol not in PROTOCOLS:
            raise ConfigError(
                f"model.protocol: expected {', '.join(PROTOCOLS)} or a class_path, found {protocol!r}. "
                "A protocol of your own is an object, or a YAML file with class_path and init_args."
            )
        self.model_name_or_path, self.scratch = model_name_or_path, scratch
        self.protocol = PROTOCOLS[protocol]() if isinstance(protocol, str) else Protocol.adopt(protocol)  # type: ignore[call-arg]
        self._optimizer_specs, self._lr_schedule = list(optimizers), lr_schedule
        self.gradient_clip_val = gradient_clip_val
        self.max_micro_batch_tokens, self.compute = max_micro_batch_tokens, compute
        self._dtype_name, self._seed, self.lora, self._eos_tokens = dtype, seed, lora, eos_tokens
        self.policy = self.tokenizer = None  # type: ignore[assignment]
        self.codec: TokenCodec = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        """Load or make model and tokenizer, once; shard them where the strategy is fsdp2."""
        dtype = self._weights_dtype()
        if self.policy is not None:  # attached by hand; buffers stay, rotary frequencies would lose what they need
            for name, weight in self.named_parameters():
                is_narrowed = dtype == torch.bfloat16 and "lora_" not in name
                weight.data = weight.data.to(dtype if is_narrowed else weight.dtype)
        elif self.model_name_or_path is not None:
            self.attach(*self._load(self.model_name_or_path, dtype))
        else:
            assert self.scratch is not None
            tokenizer = loading.word_level_tokenizer(self._vocabulary(), self.protocol.tags)
            self.attach(loading.from_scratch(self.scratch, tokenizer, dtype, self._seed), tokenizer)
        if self.device_mesh is not None and not self.policy.is_sharded:
            compute_dtype = torch.bfloat16 if str(self.trainer.precision).startswith("bf16") else None
            for policy in [module for module in self.modules() if isinstance(module, Policy)]:
                shard(policy, self.device_mesh["data_parallel"], compute_dtype)
            self._examine()

    def _weights_dtype(self) -> torch.dtype:
        """In which weights are loaded: `bf16-true` is taken care of here.

        Lightning would convert everything, rotary frequencies included, and make bfloat16 the default of every tensor.
        Under fsdp2 shards stay float32 and are gathered as bfloat16; elsewhere the optimizer keeps float32 masters.
        """
        trainer, dtype = self._trainer, getattr(torch, self._dtype_name)
        is_sharded = self.device_mesh is not None
        if is_sharded and dtype == torch.bfloat16 and self.lora is None:
            raise ConfigError(
                "model.dtype bfloat16: under fsdp2 float32 shards are the master weights. Leave it float32, and set "
                "trainer.precision bf16-true to compute in bfloat16."
            )
        if trainer is None or not isinstance(trainer.precision_plugin, HalfPrecision):
            return dtype
        if trainer.precision != "bf16-true":
            raise ConfigError(f"trainer.precision: expected bf16-true or bf16-mixed, found {trainer.precision}.")
        trainer.strategy.precision_plugin = BFloat16Weights()
        torch.set_default_dtype(torch.float32)  # Lightning's context, in which this runs, puts back what was before it
        return dtype if is_sharded else torch.bfloat16

    def _load(self, name_or_path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Model and tokenizer; where weights will be sharded, rank 0 alone reads them."""
        if self.device_mesh is None:
            return loading.load(name_or_path, dtype)
        strategy, loaded, failure = self.trainer.strategy, None, ""
        try:
            loaded = (loading.load if self.global_rank == 0 else loading.load_skeleton)(name_or_path, dtype)
        except ConfigError as error:
            failure = str(error)
        if told := strategy.broadcast(failure) or failure:
            raise ConfigError(told)
        assert loaded is not None
        return loaded

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a ready model and tokenizer; what `configure_model` does last, and all a use without a Trainer needs."""
        self.tokenizer = tokenizer
        self.codec = TokenCodec(tokenizer, self.protocol.tags, self._eos_ids(model, tokenizer))
        if self.lora is not None:
            self._adapt(model, self.lora)
        # In training mode, as Lightning expects it; there is no dropout to tell the modes apart.
        self.policy = Policy(model, self.compute.layout, self.compute.long_context, self.compute.wide_head).train()
        if self.compute.gradient_checkpointing:
            self.policy.checkpoint_gradients()
        if self.device_mesh is None:  # else once all ranks have weights
            self._examine()

    def _eos_ids(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """Tokens that end a turn: what the user says, or else all that tokenizer, model and chat template say."""
        if self._eos_tokens is None:
            known = getattr(model.generation_config, "eos_token_id", None)
            ids = known if isinstance(known, list) else [known]
            return end_of_turn_ids(tokenizer, [token_id for token_id in ids if token_id is not None])
        vocabulary = tokenizer.get_vocab()
        if unknown := [token for token in self._eos_tokens if token not in vocabulary]:
            raise ConfigError(f"model.eos_tokens: expected tokens of the tokenizer, found {', '.join(unknown)}.")
        return tuple(vocabulary[token] for token in self._eos_tokens)

    def _adapt(self, model: PreTrainedModel, lora: LoRA) -> None:
        """Put the adapter on; rank 0 alone knows the model where it will be sharded, and tells what it found."""
        failure = ""
        try:
            self.base_fingerprint = "" if model.device.type == "meta" else fingerprint(model)
            add_adapter(model, lora, self._seed, self.origin)
        except ConfigError as error:
            failure = str(error)
        if self.device_mesh is not None:
            self.base_fingerprint, told = self.trainer.strategy.broadcast((self.base_fingerprint, failure))
            failure = told or failure
        if failure:
            raise ConfigError(failure)

    def _examine(self) -> None:
        """Find out what the model can do, by running it; then it may be compiled."""
        self.policy.check(self.policy.model.device)
        if self.policy.unpackable and self.compute.layout != "padded":
            rank_zero_warn(
                f"model.compute.layout is {self.compute.layout!r}, but {self.policy.unpackable}. Sequences are padded."
            )
        if self.compute.compile_layers:
            compile_layers(self.policy.model.get_decoder())

    def _vocabulary(self) -> Sequence[str]:
        datamodule = getattr(self._trainer, "datamodule", None)
        words = datamodule.vocabulary() if datamodule is not None and hasattr(datamodule, "vocabulary") else None
        if not words:
            raise ConfigError(
                f"model.scratch needs a datamodule with a vocabulary, found {type(datamodule).__name__} without one. "
                "Use model.model_name_or_path with ordinary data."
            )
        return tuple(words)

    # Checkpoints

    @property
    def origin(self) -> dict[str, Any]:
        """What a checkpoint tells of the model that its weights belong to: its name, with adapters its fingerprint."""
        name = self.model_name_or_path or f"scratch {self.scratch.model_type if self.scratch else ''}"
        return {"name": name} | ({"base": self.base_fingerprint} if self.lora is not None else {})

    def is_saved(self, name: str) -> bool:
        """Whether checkpoints hold the weight of this name; what a run makes again when it starts stays out."""
        return self.lora is None or is_learned(name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out what a resumed run makes again, and say whose weights these are."""
        checkpoint["origin"] = self.origin
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if self.is_saved(k)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the weights of another model; keep what checkpoints do not hold as it was made."""
        if "state_dict" not in checkpoint:  # under fsdp2, whose strategy has taken the weights already
            check_base(checkpoint, self.origin)
            return
        mine = self.state_dict()
        self.check_checkpoint(checkpoint, {k: v.shape for k, v in checkpoint["state_dict"].items()}, mine)
        checkpoint["state_dict"] |= {k: v for k, v in mine.items() if not self.is_saved(k)}

    def check_checkpoint(
        self, facts: Mapping[str, Any], found: Mapping[str, torch.Size], wanted: Mapping[str, Tensor]
    ) -> None:
        """Raise ConfigError where a checkpoint belongs to another model.

        Args:
            facts: what it holds besides weights.
            found: shapes of its weights, by name.
            wanted: weights of this module that are asked of it; those that are not saved do not count.
        """
        check_model(facts, self.origin, found, {k: v.shape for k, v in wanted.items() if self.is_saved(k)})

    def whole_weights(self) -> dict[str, Tensor]:
        """The model's weights for `save_pretrained`; a collective under fsdp2."""
        return whole_weights(self.policy.model)

    def save_pretrained(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write model and tokenizer as a Hugging Face folder, adapters merged; see `write_model_folder`."""
        write_model_folder(self.policy.model, self.tokenizer, path, weights)

    def save_adapter(self, path: str | Path) -> None:
        """Write the adapter as a folder that peft loads, with the tokenizer.

        Raises:
            ConfigError: there is none.
        """
        if self.lora is None:
            raise ConfigError("adapter: this run trained all weights: it has no adapter. Leave --adapter out.")
        write_adapter(self.policy.model, Path(path), self.origin, self.model_name_or_path)
        self.tokenizer.save_pretrained(path)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """One optimizer per spec that any parameter matches, each with the same learning-rate schedule."""
        shares: list[list[nn.Parameter]] = [[] for _ in self._optimizer_specs]
        for name, parameter in self.policy.named_parameters():
            if not parameter.requires_grad:
                continue
            takers = [i for i, spec in enumerate(self._optimizer_specs) if re.search(spec.parameters, name)]
            if not takers:
                raise ConfigError(
                    f"model.optimizers: no entry takes the parameter {name!r}. Add one with parameters '.*' at the end."
                )
            shares[takers[0]].append(parameter)
        pairs = [(spec, MasterWeights(s)) for spec, s in zip(self._optimizer_specs, shares, strict=True) if s]
        self.master_weights = [masters for _, masters in pairs]
        optimizers = [masters.optimizer(spec.optimizer) for spec, masters in pairs]
        return optimizers, [LambdaLR(optimizer, self._lr_schedule.factor) for optimizer in optimizers]
