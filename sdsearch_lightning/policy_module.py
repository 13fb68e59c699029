"""What the reinforcement-learning module and the cold start share: model, tokenizer, optimizers, and the manual step.

A *step* is one batch of the loader wherever a user counts: `trainer.max_steps`, `global_step`, checkpoints and the
logger's axis all count batches, however many optimizers there are and however many updates one batch gets.

Next: module.py and supervised.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sdsearch_lightning import models
from sdsearch_lightning.adapter_folder import fingerprint
from sdsearch_lightning.adapters import LoRA, add_adapter
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.models import ScratchModel
from sdsearch_lightning.packing import LayoutName
from sdsearch_lightning.policy import Policy
from sdsearch_lightning.policy_checkpoints import PolicyCheckpoints
from sdsearch_lightning.protocol import PROTOCOLS, Protocol
from sdsearch_lightning.schedules import Schedule
from sdsearch_lightning.tokenization import TokenCodec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MicroBatch = TypeVar("MicroBatch")
ProtocolName = Literal["search_r1", "autorefine"]


@dataclass
class OptimizerSpec:
    """An optimizer and the parameters it gets."""

    optimizer: OptimizerCallable
    """As everywhere in Lightning: class_path and init_args without the parameters."""
    parameters: str = ".*"
    """Regular expression searched in parameter names; the first optimizer that matches takes the parameter."""


@dataclass
class Compute:
    """How passes through the model are run; nothing here changes a loss."""

    layout: LayoutName = "shared_prefix"
    """shared_prefix reads a group's prompt once, packed has no padding, padded is the reference; see packing.py."""
    gradient_checkpointing: bool = False
    """Keep the layers' inputs only and compute the rest again: a third more time for much less memory."""


class PolicyModule(PolicyCheckpoints):
    """Base of both modules; `__init__` is light, the model is built in `configure_model`.

    Args:
        model_name_or_path: Hugging Face folder or hub name of a causal LM with its tokenizer.
        scratch: instead, a new model; its word-level tokenizer is made of the datamodule's vocabulary.
        protocol: short name, or an object by class_path.
        optimizers: at least one; together they take every parameter.
        lr_schedule: factor on every learning rate by step.
        gradient_clip_val: gradients are clipped to this norm; None turns it off. (The trainer's own clipping does not
            work with manual optimisation.)
        max_micro_batch_tokens: tokens of one forward and backward pass; bounds memory, never changes a loss.
        compute: how a pass is run.
        dtype: weights are loaded in it. float32 unless you know better: an update of 1e-6 is lost in bfloat16 weights.
        seed: of the random weights.
        lora: learn through low-rank adapters and leave the model as it is; needs the extra `lora`.
    """

    learns_from = "questions"

    def __init__(
        self,
        model_name_or_path: str | None,
        scratch: ScratchModel | None,
        protocol: Protocol | ProtocolName,
        optimizers: Sequence[OptimizerSpec],
        lr_schedule: Schedule,
        gradient_clip_val: float | None,
        max_micro_batch_tokens: int,
        compute: Compute,
        dtype: Literal["float32", "float64", "bfloat16"],
        seed: int,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
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
        self.protocol = PROTOCOLS[protocol]() if isinstance(protocol, str) else protocol  # type: ignore[call-arg]
        self._optimizer_specs, self._lr_schedule = list(optimizers), lr_schedule
        self.gradient_clip_val = gradient_clip_val
        self.max_micro_batch_tokens, self.compute = max_micro_batch_tokens, compute
        self._dtype_name, self._seed, self.lora = dtype, seed, lora
        self.policy = self.tokenizer = None  # type: ignore[assignment]
        self.codec: TokenCodec = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        """Load or make model and tokenizer, once."""
        if self.policy is not None:
            return
        dtype = getattr(torch, self._dtype_name)
        if self.model_name_or_path is not None:
            model, self.tokenizer = models.load(self.model_name_or_path, dtype)
        else:
            assert self.scratch is not None
            self.tokenizer = models.word_level_tokenizer(self._vocabulary(), self.protocol.tags)
            model = models.from_scratch(self.scratch, self.tokenizer, dtype, self._seed)
        self.attach(model, self.tokenizer)

    def attach(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a ready model and tokenizer; what `configure_model` does last, and all a use without a Trainer needs."""
        self.tokenizer, self.codec = tokenizer, TokenCodec(tokenizer, self.protocol.tags)
        if self.lora is not None:
            self.base_fingerprint = fingerprint(model)
            add_adapter(model, self.lora, self._seed, self.origin)
        # In training mode, as Lightning expects it; there is no dropout to tell the modes apart.
        self.policy = Policy(model, self.compute.layout).train()
        self.policy.check()
        if self.policy.unpackable and self.compute.layout != "padded":
            rank_zero_warn(
                f"model.compute.layout is {self.compute.layout!r}, but {self.policy.unpackable}. Sequences are padded."
            )
        if self.compute.gradient_checkpointing:
            self.policy.checkpoint_gradients()

    def _vocabulary(self) -> Sequence[str]:
        datamodule = getattr(self._trainer, "datamodule", None)
        words = datamodule.vocabulary() if datamodule is not None and hasattr(datamodule, "vocabulary") else None
        if not words:
            raise ConfigError(
                f"model.scratch needs a datamodule with a vocabulary, found {type(datamodule).__name__} without one. "
                "Use model.model_name_or_path with ordinary data."
            )
        return tuple(words)

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
        optimizers = [spec.optimizer(share) for spec, share in zip(self._optimizer_specs, shares, strict=True) if share]
        return optimizers, [LambdaLR(optimizer, self._lr_schedule.factor) for optimizer in optimizers]

    def equalize(self, micro_batches: Sequence[MicroBatch], filler: MicroBatch) -> list[MicroBatch]:
        """`micro_batches` and as many `filler` as it takes to have at least one and the same number on every rank."""
        most = len(micro_batches)
        if self.trainer.world_size > 1:
            count = torch.tensor(most, device=self.device)
            most = int(self.trainer.strategy.reduce(count, reduce_op="max"))  # type: ignore[arg-type]
        return [*micro_batches, *[filler] * (max(most, 1) - len(micro_batches))]

    def backward_all(self, micro_batches: Sequence[MicroBatch], loss: Callable[[MicroBatch], Tensor]) -> None:
        """Backward through every micro-batch, one graph at a time; gradients are exchanged at the last one only.

        Args:
            micro_batches: as many as on every other rank.
            loss: the micro-batch's share of the loss over all ranks.
        """
        for position, micro_batch in enumerate(micro_batches):
            with self._no_sync(enabled=position < len(micro_batches) - 1):
                # DDP averages gradients over ranks, while our token weights already are those of the joint batch.
                self.manual_backward(loss(micro_batch) * self.trainer.world_size)

    def apply_gradients(self, last: bool = True) -> float:
        """Clip, step every optimizer, zero the gradients.

        Where the gradient is not finite the update is skipped: no weight and no optimizer state changes. The norm is
        that of the exchanged gradient, so all ranks skip together; a step still counts as a step.

        Args:
            last: whether this is the batch's last update: it alone advances `global_step` and the schedules.

        Returns:
            The gradient norm before clipping.
        """
        optimizers = self._optimizers()
        norm = nn.utils.get_total_norm([p.grad for p in self.policy.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            for optimizer in optimizers:
                optimizer.zero_grad()  # parameters without a gradient are passed over, weight decay included
        elif self.gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(self.policy.parameters(), self.gradient_clip_val, norm)
        for position, optimizer in enumerate(optimizers):
            counts = last and position == len(optimizers) - 1
            with contextlib.nullcontext() if counts else _uncounted(optimizer):
                optimizer.step()
            optimizer.zero_grad()
        if last:
            for schedule in self._schedules():
                schedule.step()
        return float(norm)

    @property
    def learning_rate(self) -> float:
        """That of the first optimizer, as its next step will use it."""
        rate: float = self._optimizers()[0].param_groups[0]["lr"]
        return rate

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]  # type: ignore[list-item,return-value]

    def _schedules(self) -> list[LambdaLR]:
        schedules: Any = self.lr_schedulers()
        return schedules if isinstance(schedules, list) else [schedules]

    @contextlib.contextmanager
    def _no_sync(self, enabled: bool) -> Iterator[None]:
        """Keep DDP from exchanging gradients in the backward passes inside."""
        strategy = self.trainer.strategy
        if enabled and isinstance(strategy, DDPStrategy):
            with strategy.block_backward_sync():
                yield
        else:
            yield

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks; a collective: every rank calls it."""
        total: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        return total.to(values.device)


@contextlib.contextmanager
def _uncounted(optimizer: LightningOptimizer) -> Iterator[None]:
    """Steps of `optimizer` inside do not advance `trainer.global_step`, which counts batches here."""
    hooks = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        yield
    finally:
        optimizer._on_before_step, optimizer._on_after_step = hooks
