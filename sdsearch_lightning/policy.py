"""The policy: a Hugging Face causal LM whose every training computation goes through one `forward`.

`forward` holds body, row gather and head, so that DDP and FSDP2 can wrap it as one module and nobody calls an inner
module of a wrapped root. Logits are computed at the wanted positions only, never for all tokens of a batch. This is
also the one place that shifts: the row returned for token t is the one that predicts it, that of position t - 1.

Next: module.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdsearch_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Token sequences back to back, without padding."""

    token_ids: Tensor
    """[T] long."""
    position_ids: Tensor
    """[T] long: 0, 1, 2, ... within each sequence."""
    sequence_index: Tensor
    """[T] long: which sequence a token belongs to, from 0."""
    num_sequences: int
    max_length: int

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> PackedSequences:
        """Pack lists of token ids."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return cls(
            token_ids=torch.tensor([token for sequence in sequences for token in sequence], device=device),
            position_ids=torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device),
            sequence_index=torch.repeat_interleave(lengths).to(device),
            num_sequences=len(sequences),
            max_length=int(lengths.max()),
        )

    def to(self, device: torch.device | str) -> PackedSequences:
        """The same on `device`."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            position_ids=self.position_ids.to(device),
            sequence_index=self.sequence_index.to(device),
        )


class Policy(nn.Module):
    """Body, row gather and head of one causal LM behind one `forward`.

    Args:
        model: any Hugging Face causal LM with rotary or learned positions and a linear output layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        """What weights, log-probs and advantages of a batch are kept in: float32, or float64 where the weights are."""
        return torch.float64 if self.model.dtype == torch.float64 else torch.float32

    def forward(
        self, sequences: PackedSequences, targets: Sequence[Tensor], hidden: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Logits that predict the target tokens.

        Args:
            sequences: the tokens; causal attention within each sequence.
            targets: index tensors [R_i] into the T packed tokens; never the first token of a sequence.
            hidden: [Q, H] rows of an earlier call that only need the head.

        Returns:
            logits [R_i, V] and hidden rows [R_i, H] per index tensor, and the logits [Q, V] of `hidden` (or None).
        """
        states = self._body(sequences)
        rows = [states[sequences.sequence_index[t], sequences.position_ids[t] - 1] for t in targets]
        # One product per index tensor: equal rows then go through equal shapes, so student and teacher agree exactly.
        return [self._head(r) for r in rows], rows, None if hidden is None else self._head(hidden)

    def _body(self, sequences: PackedSequences) -> Tensor:
        """[N, L, H] hidden states in the right-padded layout, which needs no mask: nothing attends to later tokens."""
        padded = sequences.token_ids.new_zeros(sequences.num_sequences, sequences.max_length)
        padded[sequences.sequence_index, sequences.position_ids] = sequences.token_ids
        states: Tensor = self.model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def check(self) -> None:
        """Compare with the model's own logits on four tokens: some families do more in their head than is done here.

        Raises:
            ConfigError: the logits differ.
        """
        device = next(self.model.parameters()).device
        tokens = [(7 * i) % self.model.config.vocab_size for i in range(4)]
        sequences = PackedSequences.pack([tokens], device)
        (mine,), _, _ = self(sequences, [torch.arange(1, 4, device=device)])
        theirs = self.model(input_ids=sequences.token_ids[None], use_cache=False).logits[0, :-1]
        if not torch.allclose(mine, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise ConfigError(
                f"Models of type {self.model.config.model_type!r} scale or shift their logits in a way that is not "
                "known here: training would use other probabilities than the model's. Use another family."
            )

    def project(self, hidden: Tensor) -> Tensor:
        """[Q, V] logits of hidden rows [Q, H] of an earlier call; for copies that nobody wraps."""
        return self._head(hidden)

    def _head(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(rows)
        if (cap := getattr(self.model.config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def decode(
        self, token_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any, last: Tensor
    ) -> Tensor:
        """[A, V] logits after feeding a chunk to a KV cache; for rollouts, outside of any wrapper.

        Args:
            token_ids: [A, W] new tokens, right-padded.
            attention_mask: [A, L + W] bool over cached and new cells; False cells are holes.
            position_ids: [A, W].
            cache: a transformers Cache, extended in place.
            last: [A] column of each row's last real token in the chunk.
        """
        states = self.model.get_decoder()(
            input_ids=token_ids,
            attention_mask=attention_mask.long(),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self._head(states[torch.arange(len(last), device=last.device), last])
