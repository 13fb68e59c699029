"""The slot engine gives what the reference engine gives, token for token, whatever its slots, order and schedule.

Scripts play through tokenizers that split tags and straddle their edges, with a policy that reads its context from the
KV rows themselves. A random model in float64 makes "the same" exact; in float32 the first difference is a tie.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.models import TalkativePolicy
from helpers.slots import SLOT_LIMITS, TALK_LIMITS, Moody, essence, essences, run_engine, slot_requests, talk_requests
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import GenerateEngine, SlotEngine
from sdsearch_lightning.rollout.sampling import Draws, exponentials
from sdsearch_lightning.types import RolloutRequest, Sampling, StopReason, Trajectory


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["byte", "bpe", "bpe, pad = eos", "metaspace"])
def test_scripts_are_played_as_by_the_reference(name: str, seed: int) -> None:
    """16 times 16 scripts; then the same ones in another order, with other slots."""
    codec, requests, policy = slot_requests(name, seed, count=16)
    reference = run_engine(GenerateEngine(), policy, codec, requests, retriever=Moody())
    assert {"ANSWERED", "MALFORMED"} <= {t.stop_reason for t in reference}
    rng = random.Random(seed)
    for slots in (16, 1, rng.randint(2, 15)):
        order = rng.sample(range(len(requests)), len(requests))
        policy.contexts.clear()
        engine = SlotEngine(max_slots=slots, overlap_steps=rng.choice([0, 1, 4, None]))
        played = run_engine(engine, policy, codec, [requests[i] for i in order], retriever=Moody())
        assert essences(played) == [essence(reference[i]) for i in order]
        for t in played:
            assert t.token_ids[:-1] == tuple(policy.contexts[t.spans[0].token_ids]), "the rows hold the rollout"


def test_all_endings_occur_in_the_scripts() -> None:
    """Or the test above would compare less than it says."""
    reasons, empty, split = set(), 0, 0
    for name in ("byte", "bpe", "metaspace"):
        for seed in range(4):
            codec, requests, policy = slot_requests(name, seed, count=16)
            split += len(codec.split_tags)
            for limits in (SLOT_LIMITS, replace(SLOT_LIMITS, max_tokens=110, max_searches=1)):
                for t in run_engine(SlotEngine(), policy, codec, requests, limits, Moody()):
                    reasons.add(t.stop_reason)
                    empty += () in t.passages and not t.stop_reason.is_error
    assert reasons == set(StopReason) and empty and split


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_tokens", [40, 110, 200])
def test_budgets_cut_alike(seed: int, max_tokens: int) -> None:
    codec, requests, policy = slot_requests("bpe", seed, count=12)
    limits = replace(SLOT_LIMITS, max_tokens=max_tokens, max_turn_tokens=25, max_observation_tokens=30, max_searches=1)
    reference = run_engine(GenerateEngine(), policy, codec, requests, limits)
    assert essences(run_engine(SlotEngine(max_slots=5), policy, codec, requests, limits)) == essences(reference)
    assert any(t.stop_reason.is_truncated for t in reference)


# A model


@pytest.mark.parametrize("seed", range(10))
def test_a_model_in_float64_rolls_out_token_for_token(seed: int, word_codec: TokenCodec) -> None:
    policy, rng = TalkativePolicy(word_codec, seed), random.Random(seed)
    requests = talk_requests(
        word_codec, 6, seed, rng.choice([Sampling(), Sampling(1.3, 0.9), Sampling(temperature=0.0)])
    )
    reference = run_engine(GenerateEngine(), policy, word_codec, requests, TALK_LIMITS)
    for slots in (1, rng.randint(2, 20), 24):
        order = rng.sample(range(len(requests)), len(requests)) if seed % 2 else range(len(requests))
        engine = SlotEngine(8.0, slots, rng.choice([0, 2, None]), max_prefill_tokens=rng.randint(1, 99))
        played = run_engine(engine, policy, word_codec, [requests[i] for i in order], TALK_LIMITS)
        for i, trajectory in zip(order, played, strict=True):
            assert essence(trajectory) == essence(reference[i])
            recorded, known = (torch.tensor(t.sampled_logprobs) for t in (trajectory, reference[i]))
            torch.testing.assert_close(recorded, known, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_in_float32_the_first_difference_is_a_tie(seed: int, word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec, seed).float()
    exact = TalkativePolicy(word_codec, seed)
    requests = talk_requests(word_codec, 8, seed)
    reference = run_engine(GenerateEngine(), policy, word_codec, requests, TALK_LIMITS)
    for slots in (3, 32):
        for request, one, other in zip(
            requests,
            reference,
            run_engine(SlotEngine(max_slots=slots), policy, word_codec, requests, TALK_LIMITS),
            strict=True,
        ):
            assert essence(one) == essence(other) or distance_to_a_tie(exact, request, one, other) < 1e-4


def distance_to_a_tie(policy: Any, request: RolloutRequest, one: Trajectory, other: Trajectory) -> float:
    """How far apart the scores of the two tokens drawn are, where rollouts first differ."""
    at = next(i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=False)) if a != b)
    assert one.policy_mask[at] and other.policy_mask[at], "what is forced does not differ first"
    draws = Draws(request.seed)
    key = [draws.next_key() for _ in range(sum(one.policy_mask[: at + 1]))][-1]
    with torch.no_grad():
        logits = policy.logits(PackedSequences.pack([one.token_ids[: at + 1]]), torch.tensor([at]))
    noise = exponentials(torch.tensor([key]), logits.shape[-1]).log().double()
    scores = ((logits / request.sampling.temperature).log_softmax(-1) - noise)[0]
    assert scores.argmax() in (one.token_ids[at], other.token_ids[at])
    return float((scores[one.token_ids[at]] - scores[other.token_ids[at]]).abs())


def test_a_tie_is_told_from_a_difference(word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec)
    requests = talk_requests(word_codec, 8)
    one = run_engine(SlotEngine(), policy, word_codec, requests, TALK_LIMITS)
    other = run_engine(SlotEngine(), policy, word_codec, [replace(r, seed=r.seed + 1) for r in requests], TALK_LIMITS)
    apart = [distance_to_a_tie(policy, r, a, b) for r, a, b in zip(requests, one, other, strict=True) if a != b]
    assert len(apart) > 20 and sorted(apart)[len(apart) // 2] > 1e-3
