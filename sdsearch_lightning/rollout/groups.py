"""From questions to groups of scored rollouts, without a Trainer: prompts, seeds, rewards, advantages, refill.

Invariant: what a rollout draws depends on its seed alone, which is made of the run's seed, the phase, the step, the
instance_id and the rollout's index; so neither batch composition nor the number of processes changes a result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sdsearch_lightning.errors import RolloutError, SDSearchError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.heard import HeardConversation, Listen
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout.engine import Engine, run_awake
from sdsearch_lightning.rollout.policy_reader import PackedReader
from sdsearch_lightning.rollout.probe import Gap, find_exact
from sdsearch_lightning.rollout.progress import RolloutProgress
from sdsearch_lightning.rollout.sampling import derive_seed
from sdsearch_lightning.rollout.search_pool import SearchCounts, SearchPool
from sdsearch_lightning.scoring.query_credit import CreditScale, QueryCredit, assigned, standardised
from sdsearch_lightning.scoring.scoring import Scoring
from sdsearch_lightning.types import InstanceId, Limits, Question, RolloutGroup, RolloutRequest, Sampling, Trajectory

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What one run of the engine gave, and what it cost."""

    trajectories: list[Trajectory]
    progress: RolloutProgress
    searches: SearchCounts


def _alone(values: Tensor) -> Tensor:
    return values


@dataclass
class GroupSampler:
    """Runs and scores the rollouts of questions with the policy's present weights.

    requests = sampler.requests(questions, instance_ids, count=5)        prompts and seeds
    window = sampler.run(requests)                                       rollouts, and their cost
    groups = sampler.scoring.groups(window.trajectories, size=5)         rewards, labels, advantages
    """

    policy: Policy
    protocol: Protocol
    codec: TokenCodec
    engine: Engine
    searches: SearchPool
    scoring: Scoring
    limits: Limits = Limits()
    sampling: Sampling = Sampling()
    """Of training rollouts."""
    seed: int = 0
    """Of the run."""
    opened: Callable[[], AbstractContextManager[object]] = nullcontext
    """Around every run of the engine: gathers sharded weights, sets the precision."""
    sum_over_ranks: Callable[[Tensor], Tensor] = field(default=_alone)
    """Where several processes run rollouts side by side: they stop together where one cannot go on."""
    credit: QueryCredit | None = None
    """What each search was worth; None = GRPO's one number per rollout."""
    credit_scale: CreditScale = "step"

    def requests(
        self,
        questions: Sequence[Question],
        instance_ids: Sequence[InstanceId],
        count: int,
        phase: str = "train",
        step: int = 0,
        sampling: Sampling | None = None,
    ) -> list[RolloutRequest]:
        """`count` requests per question, each with a seed of its own.

        Args:
            questions: B of them.
            instance_ids: one each.
            count: rollouts per question.
            phase: requests of different phases draw different numbers.
            step: the rollout batch; 0 in evaluation, which draws the same numbers every time.
            sampling: None: that of training.
        """
        requests = []
        for question, instance_id in zip(questions, instance_ids, strict=True):
            prompt_ids = self.protocol.prompt_ids(self.codec, question.text)
            for index in range(count):
                seed = derive_seed(self.seed, phase, step, instance_id, index)
                drawn = sampling or self.sampling
                requests.append(RolloutRequest(question, instance_id, index, prompt_ids, seed, drawn))
        return requests

    def run(
        self,
        requests: Sequence[RolloutRequest],
        watch: Callable[[RolloutProgress], None] | None = None,
        listen: Listen | None = None,
    ) -> WindowResult:
        """Run requests to their end, in eval mode and without gradients.

        Args:
            requests: to run.
            watch: told now and then how far they are.
            listen: told of each token, search and passage as it comes; meant for one request.

        Raises:
            SDSearchError: on all ranks, where the engine failed on one: the others would wait for it in the next step.
        """
        progress = RolloutProgress(len(requests), watch)
        converse = Conversation if listen is None else partial(HeardConversation, listen=listen)
        self.engine.attach(
            self.policy,
            lambda request: converse(request, self.protocol, self.codec, self.limits),
            self.searches,
            progress.report,
        )
        trajectories = self._together(lambda: run_awake(self.engine, self.policy, requests))
        return WindowResult(trajectories, progress, self.searches.take_counts())

    def credited(self, groups: Sequence[RolloutGroup]) -> tuple[RolloutGroup, ...]:
        """The groups of a step with the credit of each executed query, raw and standardised.

        A rollout that ended in a retrieval error gets none, and has no part in the mean.
        """
        credit = self.credit
        if credit is None:
            return tuple(groups)
        judged = [
            replace(group, trajectories=tuple(t for t in group.trajectories if not t.stop_reason.is_error))
            for group in groups
        ]

        def work() -> list[list[tuple[float, ...]]]:
            credit.read(judged, PackedReader(self.policy, self.codec))
            return [assigned(credit, group) for group in judged]

        values = self._together(work)
        flat = [[value for row in rows for value in row] for rows in values]
        relative = [iter(row) for row in standardised(flat, self.credit_scale, self.sum_over_ranks)]
        done = {}
        for group, rows, scaled in zip(judged, values, relative, strict=True):
            for t, row in zip(group.trajectories, rows, strict=True):
                advantages = tuple(next(scaled) for _ in row)
                done[t.instance_id, t.rollout_index] = replace(t, query_credit=row, query_advantages=advantages)
        return tuple(
            replace(g, trajectories=tuple(done.get((t.instance_id, t.rollout_index), t) for t in g.trajectories))
            for g in groups
        )

    def prove_engine(self) -> tuple[Gap, list[str]]:
        """Try that the engine samples from the policy, before it is relied on; see `probe.find_exact`.

        Raises:
            ConfigError: it does not, in any way that it knows.
        """
        text_ids = self.protocol.prompt_ids(self.codec, "Which river flows through the capital of the country?")
        return self._together(lambda: find_exact(self.engine, self.policy, text_ids, self.limits.max_tokens))

    def _together(self, work: Callable[[], Result]) -> Result:
        """What `work` gives, in eval mode and without gradients; where it fails on one rank, all raise."""
        failure: SDSearchError | None = None
        training = self.policy.training
        self.policy.eval()
        try:
            # Not inference_mode: its tensors cannot enter autograd later.
            with torch.no_grad(), self.opened():
                try:
                    result = work()
                except SDSearchError as error:
                    failure = error
        finally:
            self.policy.train(training)
        failures = int(self.sum_over_ranks(torch.tensor(int(failure is not None))))
        if failure is not None:
            raise failure
        if failures:
            raise RolloutError(f"The rollouts failed on {failures} other ranks; their messages say why.")
        return result

    def refill(
        self,
        groups: Sequence[RolloutGroup],
        pool: Sequence[Question],
        epoch_length: int,
        attempts: int,
        step: int = 0,
        rank: int = 0,
    ) -> tuple[RolloutGroup, ...]:
        """Replace groups whose rewards do not differ by groups of other questions (DAPO, arXiv:2503.14476).

        Args:
            groups: of one step.
            pool: questions to draw from, by a seed of this step and rank.
            epoch_length: instance ids of the new groups continue behind it, so they meet no other.
            attempts: how often; what still has no signal after the last one stays.
            step: the rollout batch.
            rank: of this process.
        """
        filled = list(groups)
        for attempt in range(1, attempts + 1):
            empty = [i for i, group in enumerate(filled) if not group.has_signal]
            if not int(self.sum_over_ranks(torch.tensor(len(empty)))):
                break  # on all ranks: rollouts are where they meet
            seed = derive_seed(self.seed, "refill", step, attempt, rank)
            drawn = random.Random(seed).sample(range(len(pool)), min(len(empty), len(pool)))
            ids = [groups[i].instance_id for i in empty[: len(drawn)]]
            more = [(epoch, position + attempt * epoch_length) for epoch, position in ids]
            size = len(groups[0].trajectories)
            window = self.run(self.requests([pool[i] for i in drawn], more, size, "train", step))
            for i, group in zip(empty, self.scoring.groups(window.trajectories, size), strict=False):
                filled[i] = group
        return tuple(filled)
