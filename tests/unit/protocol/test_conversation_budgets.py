"""Every budget of a rollout: where it ends, and that ids, masks and log-probs have one length after any cut."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from helpers.passages import PROTOCOL, QUESTION
from helpers.players import play, start
from helpers.tokenizers import TOKENIZERS
from helpers.trajectories import ANSWER, ANSWER_ROW, drawing, query_mask
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import Limits, StopReason


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_one_search_more_than_allowed_ends_the_rollout(byte_codec: TokenCodec, allowed: int) -> None:
    turns, limits = ["<search>q</search>"] * 5, Limits(max_searches=allowed)
    trajectory = play(start(byte_codec, limits=limits), byte_codec, turns)
    assert (trajectory.stop_reason, len(trajectory.queries)) == (StopReason.MAX_SEARCHES, allowed)
    assert drawing(trajectory) == ["SSSSSSSSQSSSSSSSSS"] * allowed + ["SSSSSSSSRSSSSSSSSS"]
    answered = play(start(byte_codec, limits=limits), byte_codec, [*turns[:allowed], ANSWER])
    assert answered.stop_reason is StopReason.ANSWERED  # T searches, T + 1 turns


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_invalid_actions_are_answered_until_their_budget_ends(byte_codec: TokenCodec, allowed: int) -> None:
    trajectory = play(start(byte_codec, limits=Limits(max_invalid_actions=allowed)), byte_codec, [])
    assert (trajectory.stop_reason, trajectory.num_invalid_actions) == (StopReason.MALFORMED, allowed + 1)
    assert drawing(trajectory) == ["S"] * (allowed + 1)


def test_a_turn_that_reaches_its_budget_is_an_invalid_action(byte_codec: TokenCodec) -> None:
    limits = Limits(max_turn_tokens=len(ANSWER))
    trajectory = play(start(byte_codec, limits=limits), byte_codec, ["a" * 99, ANSWER])
    assert drawing(trajectory) == ["R" * len(ANSWER), ANSWER_ROW]
    assert trajectory.num_invalid_actions == 1


@pytest.mark.parametrize(
    ("room", "rows", "queries"),
    [
        (0, [], ()),  # the prompt alone fills it
        (11, ["SSSSSSSSRRR"], ()),  # cut inside the query: not executed, not a JSD position
        (18, ["SSSSSSSSQSSSSSSSSS"], ("q",)),  # executed, but the passages find no room
        (18 + 41, ["SSSSSSSSQSSSSSSSSS"], ("q",)),  # they fit, and no token of the policy's after them
        (18 + 42, ["SSSSSSSSQSSSSSSSSS", "R"], ("q",)),
    ],
)
def test_the_token_budget_ends_the_rollout(
    byte_codec: TokenCodec, room: int, rows: list[str], queries: tuple[str, ...]
) -> None:
    prompt_length = len(PROTOCOL.prompt_ids(byte_codec, QUESTION.text))
    limits = Limits(max_observation_tokens=41, max_tokens=prompt_length + room)
    turn = "<search>qqqq" if room == 11 else "<search>q</search>"
    trajectory = play(start(byte_codec, limits=limits), byte_codec, [turn, ANSWER])
    assert (drawing(trajectory), trajectory.queries) == (rows, queries)
    assert trajectory.stop_reason is StopReason.MAX_TOKENS
    assert len(trajectory.token_ids) == prompt_length + (18 if room == 18 + 41 else room)


@pytest.mark.parametrize("name", ["byte", "bpe", "bpe, pad = eos", "metaspace"])
def test_ids_masks_and_logprobs_have_one_length_after_any_cut(name: str) -> None:
    codec, dice = TokenCodec(TOKENIZERS[name](), PROTOCOL.tags), random.Random(0)
    words = ["hm ", "?", "日本", "<search>a ?", "</search>", "<answer>", ANSWER, "<search>b</search>"]
    reasons = set()
    for _ in range(150):
        limits = Limits(dice.randint(0, 3), dice.randint(0, 2), dice.randint(1, 60), dice.randint(1, 80))
        limits = replace(limits, max_tokens=dice.randint(20, 300))
        turns = ["".join(dice.choices(words, k=dice.randint(1, 8))) for _ in range(6)]
        trajectory = play(start(codec, limits=limits), codec, turns)
        reasons.add(trajectory.stop_reason)
        ids, sampled = trajectory.token_ids, trajectory.policy_mask
        assert len(ids) == len(sampled) == len(query_mask(trajectory)) == len(trajectory.sampled_logprobs)
        assert len(ids) <= max(limits.max_tokens, trajectory.prompt_length)
        told = [lp for lp, is_sampled in zip(trajectory.sampled_logprobs, sampled, strict=True) if is_sampled]
        assert told == [-(i + 1) / 8 for i in range(len(told))]  # each log-prob is still its token's
        assert sum(trajectory.sampled_logprobs) == sum(told)
        assert all(s or not q for s, q in zip(sampled, query_mask(trajectory), strict=True))
        assert len(trajectory.queries) == len(trajectory.passages) <= limits.max_searches
    assert reasons == set(StopReason) - {StopReason.RETRIEVAL_ERROR}
