"""A rollout that is heard while it happens: what the policy writes, what it searches, what comes back.

`HeardConversation` is the ordinary state machine; it adds a call per event and changes none. Text comes in pieces of
whole characters, tags included, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.protocol.conversation import Continue, Conversation, Search, Stop
from sdsearch_lightning.types import Passage


@dataclass(frozen=True, slots=True)
class Wrote:
    """The policy wrote this; empty where a token completes no character."""

    text: str


@dataclass(frozen=True, slots=True)
class Found:
    """A search came back with passages, or failed."""

    result: tuple[Passage, ...] | RetrievalError


Event = Wrote | Search | Found | Continue | Stop
"""A Continue is an invalid action, whose message is forced."""
Listen = Callable[[Event], None]


class HeardConversation(Conversation):
    """A conversation that tells of each event, after it has happened.

    Args:
        args: those of `Conversation`.
        listen: called with each event, in the thread of the engine.
    """

    def __init__(self, *args: Any, listen: Listen) -> None:
        super().__init__(*args)
        self._listen = listen

    def accept(self, token_id: int, logprob: float) -> Continue | Search | Stop:
        """See `Conversation.accept`; the event is told."""
        turn, seen = self._turn, len(self._turn.text)
        event = super().accept(token_id, logprob)
        self._listen(Wrote(turn.text[seen:]))  # a turn that has ended was put aside, not emptied
        if not isinstance(event, Continue) or event.forced:
            self._listen(event)
        return event

    def observe(self, result: Sequence[Passage] | RetrievalError) -> tuple[int, ...]:
        """See `Conversation.observe`; the result is told."""
        forced = super().observe(result)
        self._listen(Found(result if isinstance(result, RetrievalError) else tuple(result)))
        if self.stop_reason is not None:
            self._listen(Stop(self.stop_reason))
        return forced
