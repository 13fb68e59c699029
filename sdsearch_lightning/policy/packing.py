"""Token sequences of a forward pass, and the layouts in which a model's body runs over them.

The rest of the library speaks of T tokens back to back, sequence after sequence; a layout alone knows what the body
really reads, and tells where each of the T tokens went.

    layout           body reads                                             reads less of
    Padded           [N, L], right-padded, the model's own attention        nothing: the reference
    Packed           [1, T]                                                 padding
    SharedPrefix     [1, T - what siblings share]; a prompt is there once   padding, and prompts of a group

No mask is needed in the padded layout: the attention is causal, and padding comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from sdsearch_lightning.policy.attention import AttentionLayout, CausalSegments, Segment

Item = TypeVar("Item")
LayoutName = Literal["shared_prefix", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Token sequences back to back, without padding."""

    token_ids: Tensor
    """[T] long."""
    position_ids: Tensor
    """[T] long: 0, 1, 2, ... within each sequence."""
    sequence_index: Tensor
    """[T] long: which sequence a token belongs to, from 0."""
    lengths: tuple[int, ...]
    """Tokens of each sequence."""
    shared: tuple[int, ...]
    """How many leading tokens a sequence has in common with the one before it, as far as `pack` was told to look."""

    @classmethod
    def pack(
        cls,
        sequences: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        prompt_lengths: Sequence[int] | None = None,
    ) -> PackedSequences:
        """Pack lists of token ids.

        Args:
            sequences: at least one, none of them empty.
            device: of the tensors.
            prompt_lengths: tokens of each that may be shared with its neighbours; None = nothing is.
        """
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return cls(
            token_ids=torch.tensor([token for sequence in sequences for token in sequence], device=device),
            position_ids=torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device),
            sequence_index=torch.repeat_interleave(lengths).to(device),
            lengths=tuple(lengths.tolist()),
            shared=_shared(sequences, prompt_lengths or [0] * len(sequences)),
        )

    @property
    def num_sequences(self) -> int:
        """N, the number of sequences."""
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        """L, the number of tokens of the longest sequence."""
        return max(self.lengths)

    def to(self, device: torch.device | str) -> PackedSequences:
        """The same on `device`."""
        moved = {name: getattr(self, name).to(device) for name in ("token_ids", "position_ids", "sequence_index")}
        return replace(self, **moved)


def _shared(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int]) -> tuple[int, ...]:
    shared = [0]
    for before, sequence, previous, prompt in zip(
        sequences, sequences[1:], prompt_lengths, prompt_lengths[1:], strict=False
    ):
        # Both keep a token of their own: a suffix is never empty.
        same = previous == prompt < min(len(before), len(sequence)) and before[:prompt] == sequence[:prompt]
        shared.append(prompt if same else 0)
    return tuple(shared)


class Arrangement(NamedTuple):
    """What the body reads, and where the T tokens are in it."""

    token_ids: Tensor
    """[B, X]."""
    position_ids: Tensor | None
    """[B, X]; None = 0, 1, 2, ... in each row."""
    attention: AttentionLayout | None
    """None = the model's own, causal."""
    place: Tensor
    """[T] of each token in the flattened B * X; siblings have those of a shared prefix in common."""


class Padded:
    """The layout [N, L]: every sequence is a row, padded at its end."""

    cuts_teacher: ClassVar[bool] = False
    """The reference keeps student and teacher in equal shapes: equal tokens then give equal bits."""

    def arrange(self, sequences: PackedSequences) -> Arrangement:
        """Each sequence in a row of its own, filled up with id 0."""
        padded = sequences.token_ids.new_zeros(sequences.num_sequences, sequences.max_length)
        padded[sequences.sequence_index, sequences.position_ids] = sequences.token_ids
        place = sequences.sequence_index * sequences.max_length + sequences.position_ids
        return Arrangement(padded, None, None, place)

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens the body computes for sequences of these lengths."""
        return len(lengths) * max(lengths, default=0)


class Packed:
    """The layout [1, T]: sequences back to back, as they are."""

    cuts_teacher: ClassVar[bool] = True

    def arrange(self, sequences: PackedSequences) -> Arrangement:
        """The sequences as they are, one segment of attention each."""
        attention = CausalSegments([Segment(length) for length in sequences.lengths])
        place = torch.arange(len(sequences.token_ids), device=sequences.token_ids.device)
        return Arrangement(sequences.token_ids[None], sequences.position_ids[None], attention, place)

    def size(self, lengths: Sequence[int]) -> int:
        """Tokens the body computes for sequences of these lengths, at most."""
        return sum(lengths)


class SharedPrefix(Packed):
    """[1, X]: where neighbours share their first tokens, those are read once, and what follows looks back at them.

    Two siblings with prompt `a b` and suffixes `c d` and `e`:

        T tokens    a b c d a b e
        body reads  a b c d e           segments: a b | c d (prefix 0) | e (prefix 0)
        place       0 1 2 3 0 1 4
    """

    def arrange(self, sequences: PackedSequences) -> Arrangement:
        """Tokens that siblings share stand there once, the rest of each sibling behind them."""
        segments: list[Segment] = []
        kept: list[range] = []  # of the T tokens, those that the body reads
        heads: list[int] = []  # of each sequence: the first of the T tokens of the sequence that its prefix is read in
        starts, prefix = [0, *accumulate(sequences.lengths)], 0
        for i, (start, length, shared) in enumerate(zip(starts, sequences.lengths, sequences.shared, strict=False)):
            heads.append(heads[-1] if shared else start)
            if shared:  # `prefix` is that of its run, whose first sequence was split when it began
                segments.append(Segment(length - shared, prefix))
            elif (following := next(iter(sequences.shared[i + 1 : i + 2]), 0)) > 0:
                prefix = len(segments)
                segments += [Segment(following), Segment(length - following, prefix)]
            else:
                segments.append(Segment(length))
            kept.append(range(start + shared, start + length))
        device = sequences.token_ids.device
        read = torch.tensor([token for tokens in kept for token in tokens], device=device)
        number = torch.zeros(len(sequences.token_ids), dtype=torch.long, device=device)
        number[read] = torch.arange(len(read), device=device)
        head, prompt = (torch.tensor(x, device=device)[sequences.sequence_index] for x in (heads, sequences.shared))
        place = torch.where(sequences.position_ids < prompt, number[head + sequences.position_ids], number)
        return Arrangement(
            sequences.token_ids[read][None], sequences.position_ids[read][None], CausalSegments(segments), place
        )


LAYOUTS: dict[str, Padded | Packed] = {"shared_prefix": SharedPrefix(), "packed": Packed(), "padded": Padded()}


def split_by_size(
    items: Sequence[Item],
    lengths: Callable[[Item], Sequence[int]],
    max_tokens: int,
    size: Callable[[Sequence[int]], int],
) -> list[list[Item]]:
    """Batches whose `size` stays within `max_tokens`, items with the longest sequences first.

    Args:
        items: each holds one sequence or more, and is never split; one larger than the budget gets a batch of its own.
        lengths: of an item's sequences.
        max_tokens: the budget.
        size: what a layout computes for sequences of given lengths.
    """
    batches: list[list[Item]] = []
    filled: list[int] = []
    for item in sorted(items, key=lambda item: max(lengths(item)), reverse=True):
        if not batches or size(filled + list(lengths(item))) > max_tokens:
            batches.append([])
            filled = []
        batches[-1].append(item)
        filled += lengths(item)
    return batches
