"""Rollouts from a line of letters, and back."""

from __future__ import annotations

from typing import Any

from helpers.passages import PASSAGES, PROTOCOL, QUESTION
from helpers.tokenizers import byte_tokenizer
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import InstanceId, Question, Span, SpanKind, StopReason, Trajectory

LETTERS = {
    "P": SpanKind.PROMPT,
    "R": SpanKind.REASONING,
    "Q": SpanKind.QUERY,
    "F": SpanKind.REFINE,
    "A": SpanKind.ANSWER,
    "S": SpanKind.SCAFFOLD,
    "O": SpanKind.OBSERVATION,
}


def make_trajectory(
    script: str = "R Q O R A",
    *,
    question: Question = QUESTION,
    instance_id: InstanceId = (0, 0),
    index: int = 0,
    codec: TokenCodec | None = None,
    **assigned: Any,
) -> Trajectory:
    """A finished rollout from a line such as `R:hm Q:capital_of_France O A:Paris`.

    Each word is a span, by its letter in `LETTERS`; text after the colon, `_` for a space. Q and A get their tags.

    Args:
        script: the spans after the prompt.
        question: what it is about.
        instance_id: of its group.
        index: within the group.
        codec: tokens come from it; by default one token per byte.
        assigned: other fields of `Trajectory`.
    """
    codec = codec or TokenCodec(byte_tokenizer(), PROTOCOL.tags)
    spans = [Span(SpanKind.PROMPT, PROTOCOL.prompt_ids(codec, question.text))]
    texts: dict[str, list[str]] = {letter: [] for letter in LETTERS}

    def sampled(kind: SpanKind, text: str) -> Span:
        token_ids = codec.encode(text)
        before = sum(len(span.token_ids) for span in spans if span.sampled)
        return Span(kind, token_ids, tuple(-(before + i + 1) / 8 for i in range(len(token_ids))), sampled=True)

    for word in script.split():
        letter, _, text = word.partition(":")
        text = text.replace("_", " ") or {"Q": "capital of France", "A": question.answers[0]}.get(letter, "hm")
        texts[letter].append(text)
        tag = {"Q": "search", "A": "answer"}.get(letter)
        if letter == "O":
            spans.append(Span(LETTERS[letter], PROTOCOL.observation_ids(codec, text)))
            continue
        spans += [sampled(SpanKind.SCAFFOLD, f"<{tag}>")] if tag else []
        spans += [sampled(LETTERS[letter], text)]
        spans += [sampled(SpanKind.SCAFFOLD, f"</{tag}>")] if tag else []
    fields = {
        "queries": tuple(texts["Q"]),
        "passages": tuple(PASSAGES[:1] for _ in texts["O"]),
        "answer": texts["A"][0] if texts["A"] else None,
        "refinements": tuple(texts["F"]),
        "stop_reason": StopReason.ANSWERED if texts["A"] else StopReason.MAX_TOKENS,
    }
    return Trajectory(question, instance_id, index, tuple(spans), **fields | assigned)


ANSWER, ANSWER_ROW = "<answer>x</answer>", "SSSSSSSSASSSSSSSSS"
"""A turn, and what `drawing` makes of it at one token per byte."""


def drawing(trajectory: Trajectory) -> list[str]:
    """Each turn as a row of letters, one per sampled token."""
    names = {kind: letter for letter, kind in LETTERS.items()}
    rows = [""]
    for span in trajectory.spans[1:]:
        if span.sampled:
            rows[-1] += names[span.kind] * len(span.token_ids)
        else:
            rows.append("")
    return rows if rows[-1] else rows[:-1]


def query_mask(trajectory: Trajectory) -> tuple[bool, ...]:
    """[T] True at the JSD positions: tokens strictly inside the tags of executed searches."""
    return tuple(span.kind is SpanKind.QUERY and span.sampled for span in trajectory.spans for _ in span.token_ids)
