"""Rollouts under way, and tokens that were drawn for some of them in one pass.

The device draws; the host has to see a token to know whether its rollout goes on. With async scheduling the host looks
one pass late: the next pass takes the tokens from the device, and what it draws for a rollout that had ended its turn
is one token too many, which is taken back.

    pass t       draws a        host reads a: x goes on, y ends its turn
    pass t + 1   reads a        draws b for x; for y a token too many: the cell of a is free again, y's next key too
    pass t + 2   reads b

Invariant: a slot whose last token the host has not seen holds `UNSEEN` in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdsearch_lightning.policy.placing import Place
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.rollout.sampling import Draws, sample
from sdsearch_lightning.types import RolloutRequest

UNSEEN = -1
"""In place of a token that is on the device only."""


class Slot:
    """One rollout under way: its conversation, its row of memory, and the tokens it has yet to read."""

    def __init__(self, index: int, request: RolloutRequest, conversation: Conversation) -> None:
        self.index, self.request, self.conversation = index, request, conversation
        self.draws = Draws(request.seed)
        self.unread: list[int] = list(request.prompt_ids)
        self.length = 0
        self.row = -1
        self.query = ""
        self.drawn = -1
        """Where its last token stands in the newest drawing, while the host has not seen it."""


class Drawn(NamedTuple):
    """What the host has read for one slot."""

    slot: Slot
    token_id: int
    logprob: float


class Drawing:
    """One token for each of some slots, on its way from the device.

    Args:
        slots: A slots.
        logits: [A, V] of what they have read.
        place: how the host's numbers get to the device.
        is_read_late: whether the device works on before `read`, so that the copies have to be asked for now.
    """

    def __init__(self, slots: Sequence[Slot], logits: Tensor, place: Place, is_read_late: bool) -> None:
        self._slots: list[Slot | None] = list(slots)
        self.tokens, logprobs = sample(logits, [s.request.sampling for s in slots], [s.draws for s in slots], place)
        """[A] on the device."""
        self._drawn, self._copied = [self.tokens, logprobs], None
        if is_read_late and logits.is_cuda:
            self._drawn = [x.to("cpu", non_blocking=True) for x in self._drawn]
            self._copied = torch.cuda.current_stream().record_event()
        for index, slot in enumerate(slots):
            slot.drawn, slot.unread = index, [UNSEEN]

    def take_back(self, slot: Slot) -> None:
        """Forget the token of a slot, which had ended its turn before, and what it read for it."""
        self._slots[slot.drawn] = None
        slot.draws.take_back()
        slot.length -= 1

    def read(self) -> Iterator[Drawn]:
        """The tokens that count, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens, logprobs = (x.tolist() for x in self._drawn)
        for slot, token_id, logprob in zip(self._slots, tokens, logprobs, strict=True):
            if slot is not None:
                yield Drawn(slot, token_id, logprob)
