"""SupervisedModule: the cold start. Learns written rollouts token by token, with a weight per kind of token.

A from-scratch model knows neither the protocol nor how to read a hindsight block; demonstrations teach it both. A
pretrained model brings the second by itself. The result is a Hugging Face folder that `fit` starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.head import Chunk, Outcome, Reading
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.policy.lora import LoRA
from sdsearch_lightning.policy.packing import PackedSequences, split_by_size
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.schedules import Constant, Schedule
from sdsearch_lightning.training.policy_module import Compute, OptimizerSpec, PolicyModule, ProtocolName
from sdsearch_lightning.types import Demonstration, SpanKind


@dataclass
class LossWeights:
    """Weight of each kind of token in the cold start's loss; what the environment writes is never learned."""

    reasoning: float = 1.0
    query: float = 1.0
    refine: float = 1.0
    answer: float = 1.0
    scaffold: float = 1.0
    """Tags."""
    observation: float = 0.0
    """Above 0, the policy learns to write documents itself: tags in queries follow."""

    def by_kind(self) -> Mapping[SpanKind, float]:
        """The weights by span kind; a prompt weighs nothing."""
        weights = {kind: float(getattr(self, kind.lower(), 0.0)) for kind in SpanKind}
        if min(weights.values()) < 0 or sum(weights.values()) == 0:
            raise ConfigError(f"model.loss_weights: expected none below 0 and one above 0, found {self}.")
        return weights


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    sequences: PackedSequences
    weight: Tensor
    """[T] of each token, in its kind's units."""


class SupervisedModule(PolicyModule):
    """Weighted cross-entropy on demonstrations.

    Args:
        model_name_or_path: see `PolicyModule`.
        scratch: see `PolicyModule`.
        protocol: see `PolicyModule`.
        optimizers: tried in order for each parameter, see `OptimizerSpec`; null = AdamW at 1e-5 for all.
        lr_schedule: factor on every learning rate by step.
        loss_weights: by kind of token; the loss is the weighted mean over the whole batch on all ranks.
        gradient_clip_val: see `PolicyModule`.
        max_micro_batch_tokens: see `PolicyModule`.
        compute: see `PolicyModule`.
        dtype: see `PolicyModule`.
        seed: see `PolicyModule`.
        lora: see `PolicyModule`.
    """

    learns_from = "demonstrations"

    def __init__(
        self,
        model_name_or_path: str | None = None,
        scratch: ScratchModel | None = None,
        protocol: Protocol | ProtocolName = "autorefine",
        optimizers: list[OptimizerSpec] | None = None,
        lr_schedule: Schedule = Constant(),  # noqa: B008  (stateless)
        loss_weights: LossWeights = LossWeights(),  # noqa: B008  (never changed)
        gradient_clip_val: float | None = 1.0,
        max_micro_batch_tokens: int = 32768,
        compute: Compute = Compute(),  # noqa: B008  (never changed)
        dtype: Literal["float32", "float64", "bfloat16"] = "float32",
        seed: int = 0,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__(
            model_name_or_path,
            scratch,
            protocol,
            optimizers or [OptimizerSpec(_adamw)],
            lr_schedule,
            gradient_clip_val,
            max_micro_batch_tokens,
            compute,
            dtype,
            seed,
            lora,
        )
        self._weights = loss_weights.by_kind()

    def training_step(self, batch: Sequence[Demonstration], batch_idx: int) -> None:
        """One optimizer step on a batch of demonstrations."""
        micro_batches = self._micro_batches(batch)
        counts = torch.stack([micro.weight.sum() for micro in micro_batches]).sum().double()
        total = float(self.sum_over_ranks(counts) if self.trainer.world_size > 1 else counts)
        losses: list[float] = []

        def loss(micro: _MicroBatch) -> Tensor:
            share = self.cross_entropy(micro.sequences, micro.weight) / max(total, 1e-12)
            losses.append(float(share.detach()))
            return share

        self.backward_all(micro_batches, loss)
        learning_rate = self.learning_rate  # of this step: the schedule moves on with the update
        update = self.apply_gradients()
        value = torch.tensor(sum(losses), dtype=torch.float64)
        self.log_dict(
            {
                "train/loss": float(self.sum_over_ranks(value) if self.trainer.world_size > 1 else value),
                "train/grad_norm": update.norm,
                "train/update_ratio": update.ratio,
                "train/lr": learning_rate,
            },
            batch_size=len(batch),
        )

    def cross_entropy(self, sequences: PackedSequences, weight: Tensor) -> Tensor:
        """Sum over tokens of weight times negative log-likelihood, in nats.

        Args:
            sequences: T packed tokens.
            weight: [T].
        """
        rows = weight.nonzero()[:, 0]

        def read(chunk: Chunk) -> tuple[Tensor, None]:
            where = rows[chunk.rows]
            nll = F.cross_entropy(chunk.logits.to(weight.dtype), sequences.token_ids[where], reduction="none")
            return (nll * weight[where]).sum()[None], None

        outcome: Outcome = self.policy(sequences, [Reading(rows, read)], mixture=(1.0,))
        return outcome.terms[0]

    def _micro_batches(self, batch: Sequence[Demonstration]) -> list[_MicroBatch]:
        """Demonstrations of like length together, within the token budget."""
        rows: list[tuple[list[int], list[float]]] = []
        for demonstration in batch:
            spans = self.protocol.demonstration_spans(self.codec, demonstration)
            tokens = [token for span in spans for token in span.token_ids]
            weights = [self._weights[span.kind] for span in spans for _ in span.token_ids]
            rows.append((tokens, weights))
        chunks = split_by_size(rows, lambda row: [len(row[0])], self.max_micro_batch_tokens, self.policy.layout.size)
        micro_batches = [self._pack(chunk) for chunk in chunks]
        return self.equalize(micro_batches, self._pack([([0, 0], [0.0, 0.0])]))

    def _pack(self, chunk: Sequence[tuple[list[int], list[float]]]) -> _MicroBatch:
        weight = torch.tensor([w for _, weights in chunk for w in weights], dtype=self.policy.dtype)
        return _MicroBatch(PackedSequences.pack([tokens for tokens, _ in chunk], self.device), weight.to(self.device))


def _adamw(params: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-5)  # type: ignore[arg-type]
