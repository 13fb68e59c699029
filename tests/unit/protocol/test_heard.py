"""A rollout that is heard: the same rollout, and its text in order, whatever tokens it is made of."""

from __future__ import annotations

import pytest

from helpers.passages import PASSAGES, PROTOCOL
from helpers.players import make_request, play, start
from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.protocol.conversation import Continue, Search, Stop
from sdsearch_lightning.protocol.heard import Event, Found, HeardConversation, Wrote
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import Limits, StopReason

TURNS = ("<think> Paris </think> <search> capital </search>", "Rome </search>", "<answer> Paris </answer>")


def heard(codec: TokenCodec, turns: tuple[str, ...] = TURNS, **options: object) -> tuple[list[Event], object]:
    events: list[Event] = []
    conversation = HeardConversation(make_request(codec), PROTOCOL, codec, Limits(), listen=events.append)
    return events, play(conversation, codec, turns, **options)  # type: ignore[arg-type]


def test_it_is_the_rollout_that_nobody_heard(any_codec: TokenCodec) -> None:
    events, trajectory = heard(any_codec)
    assert trajectory == play(start(any_codec), any_codec, TURNS)
    kinds = [type(event) for event in events if not isinstance(event, Wrote)]
    assert kinds == [Search, Found, Continue, Stop]
    assert [event for event in events if isinstance(event, Found)] == [Found(PASSAGES[:1])]


def test_text_comes_whole_and_in_order(any_codec: TokenCodec) -> None:
    events, _ = heard(any_codec)
    ends = [index for index, event in enumerate(events) if isinstance(event, Search | Continue | Stop)]
    turns, start_at = [], 0
    for end in ends:
        turns.append("".join(event.text for event in events[start_at:end] if isinstance(event, Wrote)))
        start_at = end + 1
    assert [turn.split() for turn in turns[:2]] == [turn.split() for turn in TURNS[:2]]
    assert turns[2].split() == TURNS[2].split()
    pieces = [event.text for event in events if isinstance(event, Wrote)]
    assert len(pieces) > len(TURNS) and "\ufffd" not in "".join(pieces)


def test_a_failed_search_is_heard_and_ends_it(byte_codec: TokenCodec) -> None:
    failure = RetrievalError("gone")
    events, _ = heard(byte_codec, TURNS[:1], search=lambda query: failure)
    assert events[-2:] == [Found(failure), Stop(StopReason.RETRIEVAL_ERROR)]


@pytest.mark.parametrize("text", ["本é", "🙂"])
def test_a_character_of_several_tokens_comes_once(byte_codec: TokenCodec, text: str) -> None:
    events, _ = heard(byte_codec, (f"<answer>{text}</answer>",))
    assert "".join(event.text for event in events if isinstance(event, Wrote)) == f"<answer>{text}</answer>"
