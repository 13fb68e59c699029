"""What every rollout engine is: requests in, trajectories out, in the same order.

An engine owns the whole multi-turn loop. It draws tokens from the policy, tells each `Conversation` of them, sends the
searches to the `SearchPool` and feeds back what the conversation forces. A rollout draws from its own seed, so neither
batch composition nor scheduling changes a result.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.rollout.search_pool import SearchPool
from sdsearch_lightning.types import Pluggable, RolloutRequest, Trajectory

StartConversation = Callable[[RolloutRequest], Conversation]
ReportProgress = Callable[[int, int, int], None]
"""Called with (rollouts ended, searches sent, tokens sampled), each since the last call."""


@dataclass(slots=True)
class WorkCounts:
    """What an engine computed, padding included; no time, so equal runs count alike."""

    prefill_tokens: int = 0
    """Fed in passes of several tokens per rollout: prompts, documents, messages."""
    decode_rows: int = 0
    """Rows of passes of one token per rollout."""
    steps: int = 0
    """Such passes, one after the other."""


def check_finite(drawn: Iterable[tuple[RolloutRequest, float]]) -> None:
    """Stop where a log-prob is not a number: its logits were not finite, and the draw means nothing.

    Raises:
        RolloutError: names the rollouts.
    """
    if bad := [request for request, logprob in drawn if math.isnan(logprob)]:
        names = ", ".join(f"{request.instance_id}/{request.rollout_index}" for request in bad[:8])
        raise RolloutError(
            f"The policy's logits are not finite in {len(bad)} rollouts (instance_id/rollout_index: {names}). Expected "
            "numbers: the weights have diverged, or the activations overflow. Resume from an earlier checkpoint with a "
            "lower learning rate, or with bf16-mixed instead of half precision."
        )


def check_context(policy: Policy, conversations: Iterable[Conversation]) -> None:
    """Refuse rollouts that may get longer than the model reads: beyond that its positions mean nothing, or fail.

    Raises:
        ConfigError: names both lengths.
    """
    allowed = max((conversation.max_tokens for conversation in conversations), default=0)
    if policy.max_context is not None and allowed > policy.max_context:
        raise ConfigError(
            f"rollout.max_tokens is {allowed}, but the model reads {policy.max_context} tokens at most "
            f"(max_position_embeddings). Set rollout.max_tokens to {policy.max_context} or less."
        )


class AskingRow(Protocol):
    """A rollout in an engine that answers searches between turns."""

    query: str | None
    """What it asks; None where it goes on or has ended."""
    conversation: Conversation


Row = TypeVar("Row", bound=AskingRow)


class Engine(Pluggable):
    """Base class of engines."""

    required, optional = ("attach", "run"), ("is_exact", "draws", "step_back", "sync", "sleep", "wake")

    draws: ClassVar[bool] = True
    """False for an engine that replays written rollouts: it is not tried against the policy."""
    is_exact: bool = True
    """False for an engine with numerics of its own, such as half precision beside a trainer in float32."""

    def attach(
        self, policy: Policy, start: StartConversation, searches: SearchPool, report: ReportProgress = lambda *_: None
    ) -> None:
        """Connect the engine to the run; called before the first `run`.

        Args:
            policy: the weights to sample from; shared with the trainer where the engine runs in process.
            start: makes the conversation of a request.
            searches: where queries go.
            report: told of progress now and then.
        """
        self.policy, self.start, self.searches, self.report = policy, start, searches, report
        self.counts = WorkCounts()
        """Work since `attach`, or since `take_counts`."""

    def take_counts(self) -> WorkCounts:
        """Work since the last call; counting starts anew."""
        counts, self.counts = self.counts, WorkCounts()
        return counts

    def answer_searches(self, rows: Sequence[Row]) -> Iterator[tuple[Row, tuple[int, ...]]]:
        """One retrieval call for the queries of all rows; each row that asked, with the tokens it has to read now."""
        asking = [row for row in rows if row.query is not None]
        self.report(0, len(asking), 0)
        results = self.searches.submit([row.query or "" for row in asking]).result() if asking else []
        for row, result in zip(asking, results, strict=True):
            row.query = None
            yield row, row.conversation.observe(result)

    @abstractmethod
    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """Run all requests to their stop reason; one trajectory per request, same order."""

    def sync(self, policy: Policy) -> None:  # noqa: B027  (optional, not abstract)
        """Bring the engine's weights up to date; nothing to do where they are shared."""

    def step_back(self) -> bool:  # noqa: B027
        """Go on in a slower way that asks less of a model; False where there is none. See probe.py."""
        return False

    def sleep(self) -> None:  # noqa: B027
        """Give back memory while the policy trains."""

    def wake(self) -> None:  # noqa: B027
        """Take back what `sleep` gave away, before rollouts run."""


def run_awake(engine: Engine, policy: Policy, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
    """Run requests with the policy's present weights; the engine holds memory of its own only meanwhile.

    Args:
        engine: attached.
        policy: whose weights it takes.
        requests: see `Engine.run`.
    """
    engine.wake()
    engine.sync(policy)
    trajectories = engine.run(requests)
    engine.sleep()
    return trajectories
