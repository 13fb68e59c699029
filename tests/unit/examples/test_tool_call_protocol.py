"""Searches as function calls: the query inside of the JSON is searched and taught, and nothing around it."""

from __future__ import annotations

import pytest

from examples.tool_call_protocol import ToolCallProtocol
from helpers.passages import QUESTION
from helpers.tokenizers import byte_tokenizer
from sdsearch_lightning.protocol.conversation import Conversation, Search
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import Limits, Passage, RolloutRequest, SpanKind, StopReason

CALL = '<think>t</think><tool_call>{"name": "search", "arguments": {"query": "who wrote it"}}</tool_call>'


def begun(protocol: ToolCallProtocol) -> tuple[Conversation, TokenCodec]:
    codec = TokenCodec(byte_tokenizer(), protocol.tags)
    request = RolloutRequest(QUESTION, (0, 0), 0, protocol.prompt_ids(codec, QUESTION.text), 0)
    return Conversation(request, protocol, codec, Limits()), codec


def say(conversation: Conversation, codec: TokenCodec, text: str) -> object:
    return [conversation.accept(token_id, -1.0) for token_id in codec.encode(text)][-1]


@pytest.mark.parametrize("chat_turns", [False, True])
def test_a_call_is_a_search(chat_turns: bool) -> None:
    conversation, codec = begun(ToolCallProtocol(chat_turns=chat_turns))
    assert conversation.closing_tags == ("</tool_call>", "</answer>")
    assert say(conversation, codec, CALL) == Search("who wrote it")
    seen = codec.decode(conversation.observe([Passage("p", "Title\ntext </tool_call>")]))
    assert "<tool_response>" in seen and "</tool_call>" not in seen and ("<|im_start|>" in seen) == chat_turns
    say(conversation, codec, "<think>t</think><answer> Bo </answer>")
    rollout = conversation.finish()
    assert (rollout.stop_reason, rollout.answer, rollout.format_faults) == (StopReason.ANSWERED, "Bo", ())
    query = [codec.decode(span.token_ids) for span in rollout.spans if span.kind is SpanKind.QUERY]
    assert query == ["who wrote it"]


@pytest.mark.parametrize("content", ["who wrote it", '{"name": "search"}', '{"query": ""}'])
def test_what_is_no_call_is_an_invalid_action(content: str) -> None:
    conversation, codec = begun(ToolCallProtocol())
    assert say(conversation, codec, f"<tool_call>{content}</tool_call>").forced  # type: ignore[attr-defined]


def test_a_list_of_queries_gives_its_first() -> None:
    call = '{"name": "search", "arguments": {"query_list": ["one", "two"]}}'
    start, end = ToolCallProtocol().query_in(call) or (0, 0)
    assert call[start:end] == "one"
