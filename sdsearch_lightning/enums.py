"""The three enumerations of the glossary; types.py re-exports them. Their strings are their names, in any case.

And a set of characters, which two rooms need.
"""

from __future__ import annotations

from enum import StrEnum

UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai and Lao, Burmese, Khmer, kana, Chinese characters: scripts that put no spaces between words."""


class _AnyCase(StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> _AnyCase | None:
        return cls.__members__.get(str(value).upper())


class SpanKind(_AnyCase):
    """What a run of tokens is. The strings are the names, as they stand in trajectories.jsonl."""

    PROMPT = "PROMPT"
    REASONING = "REASONING"  # whatever the policy writes that is none of the others, malformed actions included
    QUERY = "QUERY"  # strictly inside the tags of a search that was executed: the JSD positions
    REFINE = "REFINE"
    ANSWER = "ANSWER"
    SCAFFOLD = "SCAFFOLD"  # tags, and every token that straddles a tag boundary; end-of-sequence
    OBSERVATION = "OBSERVATION"  # forced by the environment: passages with their tags, the invalid-action message


class StopReason(_AnyCase):
    """Why a rollout ended."""

    ANSWERED = "ANSWERED"
    MAX_SEARCHES = "MAX_SEARCHES"  # asked for one search more than allowed
    MAX_TOKENS = "MAX_TOKENS"  # ran out of its token budget
    MALFORMED = "MALFORMED"  # used up its budget of invalid actions
    RETRIEVAL_ERROR = "RETRIEVAL_ERROR"  # the retriever failed: not the policy's fault, so it is not trained on

    @property
    def is_truncated(self) -> bool:
        """Whether a budget ended the rollout."""
        return self in (StopReason.MAX_TOKENS, StopReason.MAX_SEARCHES, StopReason.MALFORMED)

    @property
    def is_error(self) -> bool:
        """Whether the environment ended the rollout, so that it must not be judged."""
        return self is StopReason.RETRIEVAL_ERROR


class Label(_AnyCase):
    """Outcome of a rollout as the hindsight block tells it; independent of the reward."""

    CORRECT = "CORRECT"
    INCORRECT = "INCORRECT"
