"""How likely the present policy finds texts after what a rollout has read: many of them in few passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdsearch_lightning.losses.logprobs import at_tokens, log_softmax
from sdsearch_lightning.policy.head import Chunk, Outcome, Reading
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.scoring.query_credit import Continuation, PolicyReader

MAX_TOKENS = 16384
"""Tokens of a pass."""


class PackedReader(PolicyReader):
    """Reads with the policy as it is: the caller has set eval mode, precision and whole weights.

    Args:
        policy: who is asked.
        codec: of its tokenizer.
    """

    def __init__(self, policy: Policy, codec: TokenCodec) -> None:
        self._policy, self._codec = policy, codec

    @torch.no_grad()
    def logprobs(self, asked: Sequence[Continuation]) -> list[float]:
        """See `PolicyReader.logprobs`. What comes from outside brings no tag of its own."""
        found: list[float] = []
        batch: list[Continuation] = []
        size = 0
        for text in asked:
            length = len(text.shared) + len(text.own)
            if batch and size + length > MAX_TOKENS:
                found += self._pass(batch)
                batch, size = [], 0
            batch.append(text)
            size += length
        return found + (self._pass(batch) if batch else [])

    def _pass(self, asked: Sequence[Continuation]) -> list[float]:
        judged = [self._codec.encode_data(text.text) for text in asked]
        heads = [(*text.shared, *text.own, *self._codec.encode(text.prefix)) for text in asked]
        device = next(self._policy.parameters()).device
        packed = PackedSequences.pack(
            [head + ids for head, ids in zip(heads, judged, strict=True)],
            device,
            [len(text.shared) for text in asked],
        )
        targets, start = list[int](), 0
        for head, ids in zip(heads, judged, strict=True):
            targets += range(start + len(head), start + len(head) + len(ids))
            start += len(head) + len(ids)
        rows = torch.tensor(targets, device=device)
        tokens = packed.token_ids[rows]

        def read(chunk: Chunk) -> tuple[Tensor, Tensor]:
            return chunk.logits.new_zeros(0), at_tokens(log_softmax(chunk.logits), tokens[chunk.rows])

        outcome: Outcome = self._policy(packed, [Reading(rows, read)])
        parts = torch.cat(outcome.kept[0]).double().cpu().split([len(ids) for ids in judged])
        return [float(part.mean()) for part in parts]
