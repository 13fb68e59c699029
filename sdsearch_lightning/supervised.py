"""SupervisedModule: the cold start. Learns written rollouts token by token, with a weight per kind of token.

A model knows neither the protocol nor how to read a hindsight block; demonstrations teach it both. A small pretrained
one needs them as much: SmolLM2-135M never writes a tag by itself. The result is a Hugging Face folder that `fit` starts
from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sdsearch_lightning.losses.weights import LossWeights
from sdsearch_lightning.policy.head import Chunk, Outcome, Reading
from sdsearch_lightning.policy.packing import PackedSequences, split_by_size
from sdsearch_lightning.training.options import OptimizerSpec
from sdsearch_lightning.training.policy_module import PolicyModule
from sdsearch_lightning.types import Demonstration, Limits


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    sequences: PackedSequences
    weight: Tensor
    """[T] of each token, in its kind's units."""


class SupervisedModule(PolicyModule):
    """Weighted cross-entropy on demonstrations.

    Args:
        optimizers: a list of optimizers and the parameters each takes, tried in order for each parameter; null: AdamW
            with a learning rate of 1e-5 for all.
        loss_weights: weight of each kind of token; the loss is the weighted mean over the whole batch on all ranks.
        max_observation_tokens: tokens that the passages of one search may take; set it as the rollouts' own. An
            observation that is written as a text is taken as it stands.
        args: model_name_or_path, where it is not given by name.
        options: those of `PolicyModule`.
    """

    learns_from = "demonstrations"

    def __init__(
        self,
        *args: Any,
        optimizers: list[OptimizerSpec] | None = None,
        loss_weights: LossWeights = LossWeights(),  # noqa: B008  (frozen)
        max_observation_tokens: int = Limits().max_observation_tokens,
        **options: Any,
    ) -> None:
        super().__init__(*args, optimizers=optimizers or [OptimizerSpec(_adamw)], **options)
        self._weights, self.max_observation_tokens = loss_weights.by_kind(), max_observation_tokens

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
        update = self.clock.timed("optimizer", self.apply_gradients)
        value = torch.tensor(sum(losses), dtype=torch.float64)
        self.log_dict(
            {
                "train/loss": float(self.sum_over_ranks(value) if self.trainer.world_size > 1 else value),
                "train/grad_norm": update.norm,
                "train/update_ratio": update.ratio,
                "train/lr": learning_rate,
                **self.clock.take(),
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
            spans = self.protocol.demonstration_spans(self.codec, demonstration, self.max_observation_tokens)
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
