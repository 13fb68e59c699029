"""Tokens that the host sees one pass late: rollouts stay the same, and each turn costs one row more."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.models import TalkativePolicy
from helpers.slots import SLOT_LIMITS, TALK_LIMITS, Moody, essence, essences, run_engine, slot_requests, talk_requests
from sdsearch_lightning.errors import RolloutError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import GenerateEngine, SlotEngine
from sdsearch_lightning.rollout.drawing import Drawing
from sdsearch_lightning.rollout.sampling import Draws
from sdsearch_lightning.types import Sampling


def late(**options: Any) -> SlotEngine:
    return SlotEngine(async_scheduling=True, **options)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_scripts_are_played_as_by_the_reference(name: str, seed: int) -> None:
    codec, requests, policy = slot_requests(name, seed, count=16)
    rng = random.Random(seed)
    for limits in (SLOT_LIMITS, replace(SLOT_LIMITS, max_tokens=110, max_turn_tokens=25, max_searches=1)):
        reference = run_engine(GenerateEngine(), policy, codec, requests, limits, Moody())
        for slots in (1, 5):
            policy.contexts.clear()
            engine = late(max_slots=slots, overlap_steps=rng.choice([0, 1, 4, None]))
            played = run_engine(engine, policy, codec, requests, limits, Moody())
            assert essences(played) == essences(reference)
            for t in (t for t in played if len(t.spans) > 1):  # rows hold what the host had not seen the end of, too
                assert t.token_ids == tuple(policy.contexts[t.spans[0].token_ids])


@pytest.mark.parametrize(("seed", "recorded"), [(0, False), (0, True), (1, True), (2, False)])
def test_a_model_in_float64_rolls_out_token_for_token(seed: int, recorded: bool, word_codec: TokenCodec) -> None:
    policy, rng = TalkativePolicy(word_codec, seed), random.Random(seed)
    sampling = [Sampling(), Sampling(1.3, 0.9), Sampling(temperature=0.0)][seed]
    requests = talk_requests(word_codec, 6, seed, sampling)
    reference = run_engine(GenerateEngine(), policy, word_codec, requests, TALK_LIMITS)
    for slots in (rng.randint(2, 20), 24):
        engine = late(max_slots=slots, max_prefill_tokens=rng.randint(1, 99))
        engine._capture = (lambda step, _: step) if recorded else None
        for expected, found in zip(
            reference, run_engine(engine, policy, word_codec, requests, TALK_LIMITS), strict=True
        ):
            assert essence(found) == essence(expected)
            recorded_logprobs, known = (torch.tensor(t.sampled_logprobs) for t in (found, expected))
            torch.testing.assert_close(recorded_logprobs, known, rtol=0, atol=1e-12)


def test_each_turn_costs_one_row(word_codec: TokenCodec) -> None:
    """Ends of turns are what the host sees late: searches, messages, ends of rollouts."""
    policy, requests, engine = TalkativePolicy(word_codec, seed=1), talk_requests(word_codec, 6), late()
    taken_back: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = Drawing.take_back
        patch.setattr(Drawing, "take_back", lambda self, slot: (taken_back.append(slot.index), original(self, slot)))
        trajectories = run_engine(engine, policy, word_codec, requests, TALK_LIMITS)
    turns = [sum(not span.sampled for span in t.spans[1:]) + (t.spans[-1].sampled) for t in trajectories]
    assert len(taken_back) == sum(turns) > 2 * len(requests)
    policy_tokens = sum(sum(t.policy_mask) for t in trajectories)
    assert engine.counts.decode_rows == policy_tokens + len(taken_back)


def test_the_next_pass_starts_before_the_host_looks(word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, events = TalkativePolicy(word_codec, seed=1), list[str]()
    advance, read = policy.advance, Drawing.read

    def watched(*args: Any) -> Any:
        if hasattr(args[2], "_cell") and len(args[2]._cell):
            events.append("pass")
        return advance(*args)

    monkeypatch.setattr(policy, "advance", watched)
    monkeypatch.setattr(Drawing, "read", lambda self: (events.append("look"), read(self))[1])
    run_engine(late(), policy, word_codec, talk_requests(word_codec, 1), TALK_LIMITS)
    assert events[:3] == ["pass", "pass", "look"], events
    assert events[2:] == (["look", "pass"] * len(events))[: len(events) - 2], events
    events.clear()
    run_engine(SlotEngine(), policy, word_codec, talk_requests(word_codec, 1), TALK_LIMITS)
    assert events == ["pass", "look"] * (len(events) // 2)


@pytest.mark.parametrize("forgets", ["the key", "the cell"])
def test_a_token_too_many_that_stays_is_seen(
    forgets: str, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the tests above would not notice."""
    policy, requests = TalkativePolicy(word_codec), talk_requests(word_codec, 6)
    expected = run_engine(SlotEngine(), policy, word_codec, requests, TALK_LIMITS)
    if forgets == "the key":
        monkeypatch.setattr(Draws, "take_back", lambda draws: None)
    else:
        original = Drawing.take_back

        def leaving(drawing: Drawing, slot: Any) -> None:
            original(drawing, slot)
            slot.length += 1

        monkeypatch.setattr(Drawing, "take_back", leaving)
    try:
        found = run_engine(late(), policy, word_codec, requests, TALK_LIMITS)
    except IndexError:  # a row that is longer than its rollout comes to the end of its memory
        assert forgets == "the cell"
        return
    same = sum(a == b for a, b in zip(essences(found), essences(expected), strict=True))
    assert same < len(requests) / 2


def test_logits_that_are_not_finite_stop_the_run(word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec, seed=1)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[word_codec.encode("capital")[0]] = torch.nan
    with pytest.raises(RolloutError, match=r"not finite in 3 rollouts .*\(0, 2\)/0, \(0, 2\)/1, \(0, 2\)/2\)"):
        run_engine(late(), policy, word_codec, talk_requests(word_codec, 3), TALK_LIMITS)
