"""One advantage per token: that of the rollout, and at the tokens of a search what the search itself brought."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sdsearch_lightning.types import SpanKind, Trajectory

CreditTokens = Literal["query", "turn"]


@dataclass(frozen=True, slots=True)
class CreditPlacement:
    """How a query's credit reaches its tokens."""

    weight: float = 0.0
    """Of the credit beside the rollout's advantage; 0 = GRPO."""
    tokens: CreditTokens = "query"
    """query: the tokens strictly inside the query. turn: also what the policy wrote before it in the same turn."""
    shared: bool = False
    """Divide a query's credit among its tokens (IG-Search, arXiv:2604.15148), where else each token gets it whole."""


def token_advantages(trajectory: Trajectory, placement: CreditPlacement) -> list[float]:
    """[T] the rollout's advantage; at each token of a credited search the weighted credit of the search beside it.

    Args:
        trajectory: one without an advantage counts as 0; one without `query_advantages` gets no credit.
        placement: weight, and which tokens.
    """
    values = [trajectory.advantage or 0.0] * len(trajectory.token_ids)
    if not placement.weight or not trajectory.query_advantages:
        return values
    places = _searches(trajectory, placement.tokens)
    for tokens, credit in zip(places, trajectory.query_advantages, strict=True):
        part = placement.weight * credit / (len(tokens) if placement.shared else 1)
        for token in tokens:
            values[token] += part
    return values


def _searches(trajectory: Trajectory, which: CreditTokens) -> Iterator[list[int]]:
    """The tokens of each executed search, by their index in the rollout."""
    start, turn = 0, list[int]()
    for span in trajectory.spans:
        own = list(range(start, start + len(span.token_ids)))
        start += len(span.token_ids)
        turn = turn + own if span.sampled else []
        if span.kind is SpanKind.QUERY:
            yield own if which == "query" else turn
