"""Credit per search that the policy gives itself: how likely it finds a text after what the search returned."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.scoring.query_credit import Continuation, PolicyReader, QueryCredit
from sdsearch_lightning.types import InstanceId, RolloutGroup, SpanKind, Trajectory


class _Read(NamedTuple):
    """A search and what was read of it."""

    before: tuple[int, ...]
    """Token ids of the rollout up to the observation."""
    observation: tuple[int, ...]


def searches_of(rollout: Trajectory) -> Iterator[_Read | None]:
    """Each executed search of a rollout; None where it ended before the passages were shown."""
    tokens: list[int] = []
    pending = False
    for span in rollout.spans:
        if pending and span.kind is SpanKind.OBSERVATION:
            pending = False
            yield _Read(tuple(tokens), span.token_ids)
        if span.kind is SpanKind.QUERY:
            pending = True
        tokens += span.token_ids
    if pending:
        yield None


class PolicyCredit(QueryCredit):
    """Base of credit that is read off the policy: what is asked of it, and what is made of its answers."""

    def __init__(self) -> None:
        self._found: dict[tuple[InstanceId, int, int], float] = {}

    @abstractmethod
    def ask(self, groups: Sequence[RolloutGroup]) -> Iterator[tuple[tuple[InstanceId, int, int], list[Continuation]]]:
        """What is asked of the policy for each search that was read: its key (see `keyed`), and texts."""

    @abstractmethod
    def value(self, logprobs: Sequence[float]) -> float:
        """Credit of a search from the log-probs of its texts."""

    def read(self, groups: Sequence[RolloutGroup], reader: PolicyReader) -> None:
        """Ask for all searches of the step together; see `QueryCredit.read`."""
        asked = list(self.ask(groups))
        answers = iter(reader.logprobs([text for _, texts in asked for text in texts]))
        self._found = {key: self.value([next(answers) for _ in texts]) for key, texts in asked}

    def assign(self, group: RolloutGroup) -> list[list[float]]:
        """One number per executed query; 0 where its passages were never shown."""
        return [
            [self._found.get((t.instance_id, t.rollout_index, i), 0.0) for i in range(len(t.queries))]
            for t in group.trajectories
        ]


def keyed(groups: Sequence[RolloutGroup]) -> Iterator[tuple[tuple[InstanceId, int, int], RolloutGroup, _Read]]:
    """Each search of a step that was read, with its key and its group."""
    for group in groups:
        for rollout in group.trajectories:
            for index, search in enumerate(searches_of(rollout)):
                if search is not None:
                    yield (rollout.instance_id, rollout.rollout_index, index), group, search


class InformationGain(PolicyCredit):
    """How much a search's passages raise the policy's log-prob of the gold answer (IG-Search, arXiv:2604.15148).

        log p(gold | rollout, its passages) - mean over n random results of log p(gold | rollout, those instead)

    Log-probs are means per token of the question's first answer. Random results are what searches of other questions
    of this rank's step returned; with fewer than n of them, all there are, and 0 without any. Where the paper says no
    more than that the credit is a reward of the query's tokens, `credit.weight` 0.3 and `credit.shared` are its values.

    Args:
        num_random: n, 3 in the paper.
    """

    def __init__(self, num_random: int = 3) -> None:
        super().__init__()
        if num_random < 1:
            raise ConfigError(f"rollout.credit InformationGain.num_random: expected at least 1, found {num_random}.")
        self.num_random = num_random

    def ask(self, groups: Sequence[RolloutGroup]) -> Iterator[tuple[tuple[InstanceId, int, int], list[Continuation]]]:
        """The gold answer after the real passages, then after random ones."""
        searches = list(keyed(groups))
        for key, group, search in searches:
            others = [read.observation for other, _, read in searches if other[0] != key[0]]
            drawn = random.Random(repr(key)).sample(others, min(self.num_random, len(others)))
            gold = f" {group.question.answers[0]} "
            yield key, [Continuation(search.before, seen, "<answer>", gold) for seen in (search.observation, *drawn)]

    def value(self, logprobs: Sequence[float]) -> float:
        """Nats per token of the answer."""
        real, *others = logprobs
        return real - sum(others) / len(others) if others else 0.0


class SelfJudgement(PolicyCredit):
    """Whether the policy itself says, after reading, that the search found something: no gold answer is needed.

        log sum p(found | rollout, passages, prefix) - log sum p(missing | the same)

    The sums are over the texts of a verdict; each probability is its tokens' geometric mean. It tells something only of
    a policy that has learnt to say both: the cold start of the embedded world teaches it (`data.missing_share`).

    Args:
        found: how the policy begins where the search helped.
        missing: how it begins where it did not.
        prefix: what stands before either.
    """

    def __init__(
        self,
        found: Sequence[str] = (" need", " found"),
        missing: Sequence[str] = (" missing",),
        prefix: str = "<think>",
    ) -> None:
        super().__init__()
        self.found, self.missing, self.prefix = tuple(found), tuple(missing), prefix
        if not self.found or not self.missing or {*self.found} & {*self.missing}:
            raise ConfigError(
                "rollout.credit SelfJudgement: expected different texts for `found` and `missing`, found "
                f"{self.found} and {self.missing}."
            )

    def ask(self, groups: Sequence[RolloutGroup]) -> Iterator[tuple[tuple[InstanceId, int, int], list[Continuation]]]:
        """All texts of both verdicts after the passages."""
        for key, _, search in keyed(groups):
            read = search.before + search.observation
            yield key, [Continuation(read, (), self.prefix, verdict) for verdict in (*self.found, *self.missing)]

    def value(self, logprobs: Sequence[float]) -> float:
        """Nats: positive where the policy says that something was found."""
        split = len(self.found)
        return _log_sum(logprobs[:split]) - _log_sum(logprobs[split:])


def _log_sum(logprobs: Sequence[float]) -> float:
    largest = max(logprobs)
    return largest + math.log(math.fsum(math.exp(x - largest) for x in logprobs))
