"""One rollout as a pure state machine: tokens in, events out. Every engine drives the same one.

The texts it speaks are in templates.py, whose classes are re-exported here.

    accept(token_id, logprob) -> Continue | Search(query) | Stop(reason)
    observe(passages | error) -> forced token ids

A turn ends at the first closing tag of an action, at end-of-sequence, or at its token budget. Its tokens are then
sorted into spans by character offsets: a token that touches a tag is SCAFFOLD, what lies strictly between the tags of
an executed search is QUERY. A query that is empty or holds a tag or a special token is an invalid action, no search.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from sdsearch_lightning.errors import RetrievalError
from sdsearch_lightning.protocol.form import format_faults
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.protocol.turn_text import Region, TurnText
from sdsearch_lightning.types import (
    Limits,
    Passage,
    RolloutRequest,
    Span,
    SpanKind,
    StopReason,
    Trajectory,
)


@dataclass(frozen=True, slots=True)
class Continue:
    """Sample on. `forced` tokens, already part of the rollout, have to be fed first."""

    forced: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Search:
    """Run this query, then call `observe`."""

    query: str


@dataclass(frozen=True, slots=True)
class Stop:
    """The rollout has ended."""

    reason: StopReason


@dataclass(frozen=True, slots=True)
class _Action:
    """A closed search or answer of the current turn: its kind and where its content lies in the turn's text."""

    kind: SpanKind
    start: int
    end: int


class Conversation:
    """One rollout from prompt to stop reason.

    Worked example, one character standing for one token, `S` sampled and `F` forced:

        prompt     <think> a </think><search> q </search>  <information>..</information>  <answer> x </answer>
        hand       SSSSSSS S SSSSSSSSSSSSSSSS S SSSSSSSSS  FFFFFFFFFFFFFFFFFFFFFFFFFFFFF  SSSSSSSS S SSSSSSSSS
        kind       SCAFF   R SCAFFOLD         Q SCAFFOLD   OBSERVATION                    SCAFFOLD A SCAFFOLD
    """

    def __init__(self, request: RolloutRequest, protocol: Protocol, codec: TokenCodec, limits: Limits) -> None:
        self.request, self._protocol, self._codec, self._limits = request, protocol, codec, limits
        self._tags = re.compile("|".join(map(re.escape, protocol.tags)))
        self._spans: list[Span] = [Span(SpanKind.PROMPT, request.prompt_ids)]
        self._length = len(request.prompt_ids)
        self._queries: list[str] = []
        self._thoughts: list[str] = []
        self._passages: list[tuple[Passage, ...]] = []
        self._refinements: list[str] = []
        self._answer: str | None = None
        self._num_invalid = self._num_tagged = self._num_cut = 0
        self._turns: list[str] = []
        self._begin_turn()
        self.stop_reason: StopReason | None = None
        """None while the rollout goes on."""
        if self._length >= limits.max_tokens:
            self.stop_reason = StopReason.MAX_TOKENS

    @property
    def max_tokens(self) -> int:
        """Tokens that the whole rollout may come to, its prompt included."""
        return self._limits.max_tokens

    @property
    def turn_budget(self) -> int:
        """Tokens that the current turn may still sample."""
        return min(self._limits.max_turn_tokens - len(self._logprobs), self._limits.max_tokens - self._length)

    def _begin_turn(self) -> None:
        self._turn = TurnText(self._codec)
        self._logprobs: list[float] = []

    def accept(self, token_id: int, logprob: float) -> Continue | Search | Stop:
        """Take one sampled token with its log-prob under the sampling policy."""
        assert self.stop_reason is None, "the rollout has ended"
        seen = len(self._turn.text)
        self._turn.push(token_id)
        self._logprobs.append(logprob)
        self._length += 1
        if (action := self._closed_action(seen)) is not None:
            return self._act(action)
        if self._length >= self._limits.max_tokens:
            self._end_turn(None)
            return self._stop(StopReason.MAX_TOKENS)
        if token_id in self._codec.eos_ids or len(self._logprobs) >= self._limits.max_turn_tokens:
            return self._refuse()
        return Continue()

    def observe(self, result: Sequence[Passage] | RetrievalError) -> tuple[int, ...]:
        """Take what a search returned; the forced token ids, or () where the rollout ends here (see `stop_reason`)."""
        if isinstance(result, RetrievalError):
            self._passages.append(())
            self._stop(StopReason.RETRIEVAL_ERROR)
            return ()
        self._passages.append(tuple(result))
        token_ids, num_cut = self._protocol.passage_ids(self._codec, result, self._limits.max_observation_tokens)
        self._num_cut += num_cut
        return self._force(token_ids)

    def finish(self) -> Trajectory:
        """The finished rollout; reward, advantage and label are not assigned yet."""
        assert self.stop_reason is not None, "the rollout goes on"
        return Trajectory(
            question=self.request.question,
            instance_id=self.request.instance_id,
            rollout_index=self.request.rollout_index,
            spans=tuple(self._spans),
            stop_reason=self.stop_reason,
            queries=tuple(self._queries),
            passages=tuple(self._passages),
            thoughts=tuple(self._thoughts),
            answer=self._answer,
            refinements=tuple(self._refinements),
            num_invalid_actions=self._num_invalid,
            num_tagged_queries=self._num_tagged,
            num_cut_passages=self._num_cut,
            format_faults=self._format_faults(),
        )

    @property
    def closing_tags(self) -> tuple[str, ...]:
        """What ends a turn that holds an action."""
        return tuple(f"</{name}>" for _, name in self._protocol.actions)

    def _format_faults(self) -> tuple[str, ...]:
        actions = [name for _, name in self._protocol.actions]
        inner = [name for name in self._protocol.policy_tags if name not in actions]
        return format_faults(self._turns, inner, actions)

    def _closed_action(self, seen: int) -> _Action | None:
        """The action whose closing tag ended with the newest characters; the first one where a token closes two."""
        text, closed = self._turn.text, []
        for kind, name in self._protocol.actions:
            closing = f"</{name}>"
            if (end := text.find(closing, max(0, seen - len(closing) + 1))) >= 0:
                opening = text.find(f"<{name}>", 0, end)
                closed.append(_Action(kind, opening + len(name) + 2 if opening >= 0 else -1, end))
        return min(closed, key=lambda action: action.end, default=None)

    def _act(self, action: _Action) -> Continue | Search | Stop:
        if action.start < 0:  # a closing tag without its opening one
            return self._refuse()
        content = self._turn.text[action.start : action.end]
        if action.kind is SpanKind.ANSWER:
            self._end_turn(action)
            self._answer = content.strip()
            return self._stop(StopReason.ANSWERED)
        if self._codec.holds_control(content):
            self._num_tagged += 1
            return self._refuse()
        if (found := self._protocol.query_in(content)) is None or not content[slice(*found)].strip():
            return self._refuse()
        if len(self._queries) >= self._limits.max_searches:
            self._end_turn(None)
            return self._stop(StopReason.MAX_SEARCHES)
        thought = " ".join(self._tags.sub(" ", self._turn.text[: action.start]).split())
        self._end_turn(_Action(action.kind, action.start + found[0], action.start + found[1]))
        self._queries.append(content[slice(*found)].strip())
        self._thoughts.append(thought)
        return Search(self._queries[-1])

    def _refuse(self) -> Continue | Stop:
        self._end_turn(None)
        self._num_invalid += 1
        if self._num_invalid > self._limits.max_invalid_actions:
            return self._stop(StopReason.MALFORMED)
        forced = self._force(self._codec.encode(self._protocol.invalid_message))
        return Continue(forced) if self.stop_reason is None else Stop(self.stop_reason)

    def _stop(self, reason: StopReason) -> Stop:
        self.stop_reason = reason
        return Stop(reason)

    def _force(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Append an observation, unless it would leave no room for the policy: then the rollout ends before it."""
        if self._length + len(token_ids) >= self._limits.max_tokens:
            self._stop(StopReason.MAX_TOKENS)
            return ()
        self._spans.append(Span(SpanKind.OBSERVATION, token_ids))
        self._length += len(token_ids)
        return token_ids

    def _end_turn(self, action: _Action | None) -> None:
        """Sort the turn's tokens into spans, see turn_text.py."""
        text = self._turn.text
        self._turns.append(text)
        regions = [] if action is None else [Region(action.start, action.end, action.kind)]
        if "refine" in self._protocol.policy_tags:
            refined = [match.span(1) for match in re.finditer(r"<refine>(.*?)</refine>", text, re.DOTALL)]
            self._refinements += [text[start:end].strip() for start, end in refined]
            regions += [Region(start, end, SpanKind.REFINE) for start, end in refined]
        kinds = self._turn.kinds(regions, self._tags, self._codec.special_ids)
        rows = zip(kinds, self._turn.token_ids, self._logprobs, strict=True)
        for span_kind, run in groupby(rows, key=lambda row: row[0]):
            _, token_ids, logprobs = zip(*run, strict=True)
            self._spans.append(Span(span_kind, token_ids, logprobs, sampled=True))
        self._begin_turn()
