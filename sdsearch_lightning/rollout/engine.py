"""What every rollout engine is: requests in, trajectories out, in the same order.

An engine owns the whole multi-turn loop. It draws tokens from the policy, tells each `Conversation` of them, sends the
searches to the `SearchPool` and feeds back what the conversation forces. A rollout draws from its own seed, so neither
batch composition nor scheduling changes a result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from sdsearch_lightning.policy import Policy
from sdsearch_lightning.protocol import Conversation
from sdsearch_lightning.rollout.search_pool import SearchPool
from sdsearch_lightning.types import Pluggable, RolloutRequest, Trajectory

StartConversation = Callable[[RolloutRequest], Conversation]
ReportProgress = Callable[[int, int, int], None]
"""Called with (rollouts ended, searches sent, tokens sampled), each since the last call."""


class Engine(Pluggable):
    """Base class of engines."""

    required = ("attach", "run")

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

    @abstractmethod
    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """Run all requests to their stop reason; one trajectory per request, same order."""

    def sync(self, policy: Policy) -> None:  # noqa: B027  (optional, not abstract)
        """Bring the engine's weights up to date; nothing to do where they are shared."""

    def sleep(self) -> None:  # noqa: B027
        """Give back memory while the policy trains."""

    def wake(self) -> None:  # noqa: B027
        """Undo `sleep`."""
