"""GroupSampler by itself: rollouts, scores and the trial of the engine without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.models import TalkativePolicy
from helpers.passages import PROTOCOL, ToyRetriever
from helpers.slots import TALK_LIMITS, TALK_QUESTIONS
from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine, GenerateEngine, SearchPool, SlotEngine, policy_reader
from sdsearch_lightning.rollout.groups import GroupSampler
from sdsearch_lightning.rollout.policy_reader import PackedReader
from sdsearch_lightning.rollout.probe import EXACT
from sdsearch_lightning.scoring.advantages import group_relative
from sdsearch_lightning.scoring.query_credit import Continuation, QueryCredit
from sdsearch_lightning.scoring.rewards import ExactMatchReward, F1LabelRule
from sdsearch_lightning.scoring.scoring import Scoring
from sdsearch_lightning.types import RolloutGroup, RolloutRequest, StopReason, Trajectory

IDS = [(0, i) for i in range(len(TALK_QUESTIONS))]


@pytest.fixture
def searches() -> Iterator[SearchPool]:
    pool = SearchPool(ToyRetriever(), top_k=2)
    yield pool
    pool.close()


def make_sampler(codec: TokenCodec, searches: SearchPool, engine: Engine | None = None, **options: Any) -> GroupSampler:
    scoring = Scoring(ExactMatchReward(), F1LabelRule())
    policy = TalkativePolicy(codec, seed=1)
    return GroupSampler(policy, PROTOCOL, codec, engine or SlotEngine(), searches, scoring, TALK_LIMITS, **options)


def test_questions_become_scored_groups(word_codec: TokenCodec, searches: SearchPool) -> None:
    sampler = make_sampler(word_codec, searches)
    requests = sampler.requests(TALK_QUESTIONS, IDS, count=3)
    window = sampler.run(requests)
    groups = sampler.scoring.groups(window.trajectories, size=3)
    assert [group.question for group in groups] == TALK_QUESTIONS and [group.instance_id for group in groups] == IDS
    for group in groups:
        rewards = torch.tensor([[t.reward for t in group.trajectories]], dtype=torch.float64)
        assert [[t.advantage for t in group.trajectories]] == group_relative(rewards).tolist()
    assert window.searches.queries == sum(len(t.queries) for t in window.trajectories) > 0
    policy = sampler.policy
    for t in window.trajectories:
        sampled = torch.tensor(t.policy_mask).nonzero()[:, 0]
        logprobs = policy.logits(PackedSequences.pack([t.token_ids]), sampled).log_softmax(-1)
        mine = logprobs.gather(1, torch.tensor(t.token_ids)[sampled, None])[:, 0]
        recorded = torch.tensor([x for span in t.spans for x in span.logprobs or ()], dtype=torch.float64)
        torch.testing.assert_close(mine, recorded, rtol=0, atol=1e-10)


def test_the_same_seed_gives_the_same_rollouts(word_codec: TokenCodec, searches: SearchPool) -> None:
    def drawn(seed: int = 0, step: int = 0) -> list[tuple[int, ...]]:
        sampler = make_sampler(word_codec, searches, seed=seed)
        return [t.token_ids for t in sampler.run(sampler.requests(TALK_QUESTIONS, IDS, 2, step=step)).trajectories]

    assert drawn() == drawn() and drawn() != drawn(seed=1) and drawn() != drawn(step=1)


@pytest.mark.parametrize("training", [True, False])
def test_the_policy_is_left_as_it_was(word_codec: TokenCodec, searches: SearchPool, training: bool) -> None:
    entered: list[tuple[bool, bool]] = []

    @contextmanager
    def opened() -> Iterator[None]:
        entered.append((sampler.policy.training, torch.is_grad_enabled()))
        yield

    sampler = make_sampler(word_codec, searches, opened=opened)
    sampler.policy.train(training)
    sampler.prove_engine()
    sampler.run(sampler.requests(TALK_QUESTIONS[:1], IDS[:1], 1))
    assert entered == [(False, False)] * 2, "in eval mode, without gradients, inside what opens weights"
    assert sampler.policy.training is training and torch.is_grad_enabled()


# Credit per search


class Lengths(QueryCredit):
    """Characters of a query; counts how often it is asked to read."""

    num_read = 0

    def read(self, groups: Sequence[RolloutGroup], reader: Any) -> None:
        self.num_read += 1
        assert not torch.is_grad_enabled()

    def assign(self, group: RolloutGroup) -> list[list[float]]:
        return [[float(len(query)) for query in t.queries] for t in group.trajectories]


def test_searches_get_their_credit(word_codec: TokenCodec, searches: SearchPool) -> None:
    credit = Lengths()
    sampler = make_sampler(word_codec, searches, credit=credit)
    window = sampler.run(sampler.requests(TALK_QUESTIONS, IDS, count=3))
    plain = sampler.scoring.groups(window.trajectories, size=3)
    failed = replace(plain[0].trajectories[0], stop_reason=StopReason.RETRIEVAL_ERROR)
    plain = (replace(plain[0], trajectories=(failed, *plain[0].trajectories[1:])), *plain[1:])
    groups = sampler.credited(plain)
    assert credit.num_read == 1 and groups[0].trajectories[0] == failed, "the environment's fault: no credit"
    rollouts = [t for g in groups for t in g.trajectories][1:]
    assert all(t.query_credit == tuple(float(len(q)) for q in t.queries) for t in rollouts)
    raw = torch.tensor([x for t in rollouts for x in t.query_credit or ()], dtype=torch.float64)
    wanted = (raw - raw.mean()) / (raw.std() + 1e-6)
    found = torch.tensor([x for t in rollouts for x in t.query_advantages or ()], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert len(found) > 3 and found.abs().max() > 0.1
    bare = [replace(t, query_credit=None, query_advantages=None) for g in groups for t in g.trajectories]
    assert bare == [t for g in plain for t in g.trajectories], "nothing else has changed"
    assert make_sampler(word_codec, searches).credited(plain) == plain


def test_a_credit_that_fails_on_one_rank_stops_all(word_codec: TokenCodec, searches: SearchPool) -> None:
    sampler = make_sampler(word_codec, searches, credit=Lengths(), sum_over_ranks=lambda failed: failed + 1)
    groups = sampler.scoring.groups([], size=3)
    with pytest.raises(RolloutError, match="failed on 1 other ranks"):
        sampler.credited(groups)


@pytest.mark.parametrize("shared", [True, False])
def test_the_policy_is_asked_exactly(word_codec: TokenCodec, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In few passes with shared beginnings, as one by one in a plain pass."""
    policy = TalkativePolicy(word_codec)
    words = word_codec.encode("where is Paris")
    asked = [
        Continuation(words, word_codec.encode(own), "<answer>", text)
        for own in ("Rome", "France is", "Paris Paris Rome")
        for text in (" Paris ", " Rome is France ")
    ]
    if not shared:
        asked = [a._replace(shared=(), own=a.shared + a.own) for a in asked]
    with torch.no_grad():
        found = PackedReader(policy, word_codec).logprobs(asked)
        for ours, a in zip(found, asked, strict=True):
            head, ids = [*a.shared, *a.own, *word_codec.encode(a.prefix)], word_codec.encode_data(a.text)
            targets = torch.arange(len(head), len(head) + len(ids))
            rows = policy.logits(PackedSequences.pack([[*head, *ids]]), targets).log_softmax(-1)
            value = float(rows.gather(1, torch.tensor(ids)[:, None]).mean())
            assert ours == pytest.approx(value, abs=1e-12) and ours != pytest.approx(value * (1 + 1e-6), abs=1e-12)
        assert len(set(found)) == len(found)
        monkeypatch.setattr(policy_reader, "MAX_TOKENS", 9)
        assert PackedReader(policy, word_codec).logprobs(asked) == pytest.approx(found, abs=1e-12)
        assert PackedReader(policy, word_codec).logprobs([]) == []


# The trial of the engine


class Stale(SlotEngine):
    """Samples from weights that are not the policy's."""

    def attach(self, policy: Any, *rest: Any) -> None:
        other = TalkativePolicy(self.codec, seed=2)  # type: ignore[attr-defined]
        super().attach(other, *rest)


class Honest(GenerateEngine):
    """Wrong until it steps back."""

    stepped = False

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        if not self.stepped:
            raise RuntimeError("a shape that does not fit\nand a long story")
        return super().run(requests)

    def step_back(self) -> bool:
        now, self.stepped = self.stepped, True
        return not now


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine()])
def test_an_engine_is_proven_without_a_trainer(word_codec: TokenCodec, searches: SearchPool, engine: Engine) -> None:
    sampler = make_sampler(word_codec, searches, engine)
    gap, reasons = sampler.prove_engine()
    assert gap.most < 1e-10 and gap.rounding == EXACT and not reasons
    assert sampler.run(sampler.requests(TALK_QUESTIONS, IDS, 1)).trajectories, "attached to the rollouts again"


def test_an_engine_with_other_weights_is_refused(word_codec: TokenCodec, searches: SearchPool) -> None:
    engine = Stale()
    engine.codec = word_codec  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"rollout.engine: Stale does not sample from the policy .* differ .* nats"):
        make_sampler(word_codec, searches, engine).prove_engine()


def test_an_engine_that_breaks_steps_back(word_codec: TokenCodec, searches: SearchPool) -> None:
    gap, reasons = make_sampler(word_codec, searches, Honest()).prove_engine()
    assert gap.most < 1e-10 and reasons == ["RuntimeError: a shape that does not fit"]


def test_a_rank_that_fails_stops_the_others(word_codec: TokenCodec, searches: SearchPool) -> None:
    sampler = make_sampler(word_codec, searches, sum_over_ranks=lambda failures: failures + 1)
    with pytest.raises(RolloutError, match="failed on 1 other ranks"):
        sampler.prove_engine()
    with pytest.raises(RolloutError, match="failed on 1 other ranks"):
        sampler.run(sampler.requests(TALK_QUESTIONS[:1], IDS[:1], 1))
