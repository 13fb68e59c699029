"""The reference engine: what it samples from is exactly what a forward pass over the finished rollout sees.

Most tests run a random Llama over whole words, which searches and answers by chance; float64 makes "the same" exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from helpers.models import TalkativePolicy
from helpers.passages import PASSAGES, PROTOCOL, ToyRetriever
from helpers.players import GREEDY, ScriptedPolicy, make_request
from helpers.slots import TALK_LIMITS, TALK_QUESTIONS, essence, run_engine, talk_requests
from helpers.tokenizers import EOS, TOKENIZERS
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import GenerateEngine, SearchPool
from sdsearch_lightning.step.collate import collate, weigh
from sdsearch_lightning.types import (
    Limits,
    RolloutGroup,
    RolloutRequest,
    Sampling,
    StopReason,
    Trajectory,
)


@pytest.fixture(scope="module")
def policy(word_codec: TokenCodec) -> TalkativePolicy:
    return TalkativePolicy(word_codec, seed=42)


def run(
    policy: torch.nn.Module,
    codec: TokenCodec,
    requests: Sequence[RolloutRequest],
    retriever: ToyRetriever | None = None,
    limits: Limits = TALK_LIMITS,
    max_batch_size: int = 256,
) -> list[Trajectory]:
    return run_engine(GenerateEngine(max_batch_size), policy, codec, requests, limits, retriever)


def forward_logprobs(policy: Policy, token_ids: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """[T - 1] log-probs of all tokens but the first, from one pass over the whole sequence."""
    packed = PackedSequences.pack([token_ids])
    with torch.no_grad():
        logits = policy.logits(packed, torch.arange(1, len(token_ids)))
    return (logits / temperature).log_softmax(-1).gather(1, packed.token_ids[1:, None])[:, 0]


def sampled_error(policy: Policy, trajectory: Trajectory, token_ids: Sequence[int], temperature: float = 1.0) -> float:
    """Largest distance between recorded log-probs and those of a forward pass over `token_ids`."""
    mask = torch.tensor(trajectory.policy_mask[1:])
    recorded = torch.tensor(trajectory.sampled_logprobs[1:], dtype=torch.float64)
    return float((forward_logprobs(policy, token_ids, temperature) - recorded)[mask].abs().max())


# Token in, token out


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(1.5, 0.8), GREEDY])
def test_sampled_logprobs_are_those_of_a_forward_pass(
    policy: TalkativePolicy, word_codec: TokenCodec, sampling: Sampling
) -> None:
    trajectories = run(policy, word_codec, talk_requests(word_codec, sampling=sampling))
    temperature = sampling.temperature or 1.0
    assert max(sampled_error(policy, t, t.token_ids, temperature) for t in trajectories) <= 1e-10
    spoiled = [(5, *t.token_ids[1:]) for t in trajectories]  # another first token, and nothing fits any more
    errors = [sampled_error(policy, t, ids, temperature) for t, ids in zip(trajectories, spoiled, strict=True)]
    assert min(errors) > 1e-6


def test_the_toy_policy_does_all_that_a_policy_can_do(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    trajectories = run(policy, word_codec, talk_requests(word_codec))
    assert {t.stop_reason for t in trajectories} == set(StopReason) - {StopReason.RETRIEVAL_ERROR}
    assert {len(t.queries) for t in trajectories} == {0, 1, 2}
    assert any(t.num_invalid_actions and t.queries for t in trajectories)


def test_what_is_trained_on_is_what_was_sampled(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    trajectories = run(policy, word_codec, talk_requests(word_codec))
    groups = groups_of(trajectories)
    rollouts = [rollout for group in weigh(groups, [None] * 4, "token-mean") for rollout in group]
    batch = collate(rollouts)
    assert tuple(batch.token_ids.tolist()) == tuple(token for t in trajectories for token in t.token_ids)
    assert tuple((batch.policy_weight > 0).tolist()) == tuple(flag for t in trajectories for flag in t.policy_mask)


def groups_of(trajectories: Sequence[Trajectory], count: int = 6) -> list[RolloutGroup]:
    """Groups with made-up advantages."""
    scored = [replace(t, reward=0.0, advantage=(-1.0) ** i * (1 + i / 7)) for i, t in enumerate(trajectories)]
    return [
        RolloutGroup(question, (0, i), tuple(scored[count * i : count * (i + 1)]))
        for i, question in enumerate(TALK_QUESTIONS)
    ]


def test_the_first_update_sees_a_ratio_of_exactly_one(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    module = SDSearchModule("unused", protocol=PROTOCOL, kl_coef=0.0)
    module.attach(policy.model, word_codec.tokenizer)
    module.policy = policy
    weighed = weigh(
        groups_of(run(policy, word_codec, talk_requests(word_codec))), [None] * 4, "token-mean", dtype=torch.float64
    )
    batch = collate([rollout for group in weighed for rollout in group], dtype=torch.float64)
    first = module.student_step(replace(batch, on_policy=True))
    rows = batch.policy_weight != 0
    assert first.policy_loss.item() == (-batch.advantages[rows] * batch.policy_weight[rows]).sum().item()
    later = module.student_step(batch)
    assert later.policy_loss.item() == pytest.approx(first.policy_loss.item(), abs=1e-12)
    assert float(first.metrics["clipped"]) == float(later.metrics["clipped"]) == 0.0


# Nothing but the seed decides


@pytest.mark.parametrize("max_batch_size", [1, 7])
@pytest.mark.parametrize("reverse", [False, True])
def test_batch_size_and_order_change_nothing(
    policy: TalkativePolicy, word_codec: TokenCodec, max_batch_size: int, reverse: bool
) -> None:
    requests = talk_requests(word_codec)
    expected = run(policy, word_codec, requests)
    if reverse:
        requests, expected = requests[::-1], expected[::-1]
    found = run(policy, word_codec, requests, max_batch_size=max_batch_size)
    assert [essence(t) for t in found] == [essence(t) for t in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.sampled_logprobs == pytest.approx(other.sampled_logprobs, abs=1e-10)


def test_seeds_decide_and_greedy_ignores_them(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    def tokens(sampling: Sampling, seeds: Sequence[int]) -> list[tuple[int, ...]]:
        request = make_request(word_codec, TALK_QUESTIONS[0], sampling=sampling)
        return [t.token_ids for t in run(policy, word_codec, [replace(request, seed=seed) for seed in seeds])]

    assert len(set(tokens(Sampling(), range(8)))) == 8
    assert tokens(Sampling(), [3, 3]) == [tokens(Sampling(), [3])[0]] * 2
    greedy = tokens(GREEDY, range(4))
    assert len(set(greedy)) == 1
    assert tokens(GREEDY, [0]) == greedy[:1]  # twice the same
    assert tokens(Sampling(1.0, top_p=1e-9), range(2)) == greedy[:2]
    assert tokens(Sampling(), [0]) != greedy[:1]


def test_a_prompt_that_a_group_shares_is_run_once(
    policy: TalkativePolicy, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, decode = [], policy.decode

    def spy(token_ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        shapes.append(tuple(token_ids.shape))
        return decode(token_ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "decode", spy)
    requests = talk_requests(word_codec, count=5)
    run(policy, word_codec, requests)
    assert shapes[0] == (4, max(len(request.prompt_ids) for request in requests))
    assert shapes[1] == (20, 1)


# Turns


TURNS = {
    "where is Paris ?": [
        "hm <search> capital of France </search>",
        "<search> Rome </search>",
        "<answer> Paris </answer>",
    ],
    "who": [f"a {EOS}", "<search> capital of France </search>", "<answer> b </answer>"],
    "capital of France": ["<answer> a b </answer>"],
    "the city of Rome is where ?": ["<search> the city </search>", "a </search>", "<answer> Italy </answer>"],
}


@pytest.mark.parametrize("name", ["byte", "bpe", "bpe, pad = eos", "metaspace"])
def test_given_turns_are_played_with_one_search_per_turn(name: str) -> None:
    """With tokenizers that split the tags; the cache holds exactly the finished rollouts."""
    codec = TokenCodec(TOKENIZERS[name](), PROTOCOL.tags)
    requests = [make_request(codec, question, (0, i)) for i, question in enumerate(TALK_QUESTIONS)]
    scripts = {
        request.prompt_ids: [token for turn in TURNS[request.question.text] for token in codec.encode(turn)]
        for request in requests
    }
    policy, retriever = ScriptedPolicy(scripts, len(codec.tokenizer)), ToyRetriever()
    limits = Limits(max_turn_tokens=90, max_observation_tokens=70)
    trajectories = run(policy, codec, requests, retriever, limits)
    assert retriever.calls == [["capital of France", "the city"], ["Rome"]], "what is known is not asked again"
    asked = [("capital of France", "Rome"), ("capital of France",), (), ("the city",)]
    assert [t.queries for t in trajectories] == asked
    assert [t.answer for t in trajectories] == ["Paris", "b", "a b", "Italy"]
    assert [t.num_invalid_actions for t in trajectories] == [0, 1, 0, 1]
    for request, trajectory in zip(requests, trajectories, strict=True):
        assert trajectory.token_ids[:-1] == tuple(policy.contexts[request.prompt_ids])
        sampled = [t for t, is_sampled in zip(trajectory.token_ids, trajectory.policy_mask, strict=True) if is_sampled]
        assert sampled == scripts[request.prompt_ids]


def test_progress_adds_up(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    engine, pool, told = GenerateEngine(10), SearchPool(ToyRetriever(), 2), []
    engine.attach(
        policy,
        lambda request: Conversation(request, PROTOCOL, word_codec, TALK_LIMITS),
        pool,
        lambda *counts: told.append(counts),
    )
    trajectories = engine.run(talk_requests(word_codec))
    sampled, searches = sum(sum(t.policy_mask) for t in trajectories), sum(len(t.queries) for t in trajectories)
    assert tuple(map(sum, zip(*told, strict=True))) == (24, searches, sampled)
    assert pool.take_counts().queries == searches
    assert engine.run([]) == []


# Failures and budgets


def test_a_retriever_that_is_down_ends_the_rollouts_that_asked(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    def fail(queries: Sequence[str]) -> None:
        raise ConnectionError("down")

    healthy = run(policy, word_codec, talk_requests(word_codec))
    broken = run(policy, word_codec, talk_requests(word_codec), ToyRetriever(fail=fail))
    for one, other in zip(healthy, broken, strict=True):
        assert (other.stop_reason is StopReason.RETRIEVAL_ERROR) == bool(one.queries)
        assert other.queries == one.queries[:1]
        assert one.token_ids[: len(other.token_ids)] == other.token_ids


def test_a_poisonous_query_ends_its_own_rollout_only(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    healthy = run(policy, word_codec, talk_requests(word_codec))
    poison = next(t.queries[0] for t in healthy if t.queries)

    def fail(queries: Sequence[str]) -> None:
        if poison in queries:
            raise ValueError(poison)

    broken = run(policy, word_codec, talk_requests(word_codec), ToyRetriever(fail=fail))
    failed = [t.stop_reason is StopReason.RETRIEVAL_ERROR for t in broken]
    assert failed == [poison in t.queries for t in healthy] and 0 < sum(failed) < len(failed)
    kept = [(one, other) for one, other, bad in zip(healthy, broken, failed, strict=True) if not bad]
    assert all(essence(one) == essence(other) for one, other in kept)


@pytest.mark.parametrize("max_tokens", [2, 8, 9, 40])
def test_a_prompt_beyond_the_budget_samples_nothing(
    policy: TalkativePolicy, word_codec: TokenCodec, max_tokens: int
) -> None:
    requests = talk_requests(word_codec, count=2)
    trajectories = run(policy, word_codec, requests, limits=replace(TALK_LIMITS, max_tokens=max_tokens))
    for request, trajectory in zip(requests, trajectories, strict=True):
        if len(request.prompt_ids) >= max_tokens:
            assert trajectory.stop_reason is StopReason.MAX_TOKENS and len(trajectory.spans) == 1
        else:
            assert any(trajectory.policy_mask) and len(trajectory.token_ids) <= max_tokens
    assert [t.question.id for t in trajectories] == [r.question.id for r in requests]


def test_passages_reach_the_policy(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    """Or every other comparison here would compare runs without observations."""

    def sampled(retriever: ToyRetriever) -> list[list[tuple[int, ...]]]:
        trajectories = run(policy, word_codec, talk_requests(word_codec), retriever)
        return [[span.token_ids for span in t.spans if span.sampled] for t in trajectories]

    searched = [bool(t.queries) for t in run(policy, word_codec, talk_requests(word_codec))]
    differ = [one != two for one, two in zip(sampled(ToyRetriever()), sampled(ToyRetriever(PASSAGES[4:])), strict=True)]
    assert sum(differ) > 5 and all(s or not d for s, d in zip(searched, differ, strict=True))
