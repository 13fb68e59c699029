"""What a window of slots does with memory, searches and trouble."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.models import TalkativePolicy, tiny_model
from helpers.passages import ToyRetriever
from helpers.players import make_request
from helpers.slots import SLOT_LIMITS, TALK_LIMITS, essences, run_engine, slot_requests, talk_requests
from helpers.training_rollouts import TRAINING_CODEC
from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.policy.policy import Policy
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import GenerateEngine, SearchPool, SlotEngine
from sdsearch_lightning.rollout.kv_rows import CellShape, KVRows, KVShape
from sdsearch_lightning.types import Passage


@pytest.fixture
def policy(word_codec: TokenCodec) -> TalkativePolicy:
    return TalkativePolicy(word_codec, seed=1)


def spy(policy: Any, monkeypatch: pytest.MonkeyPatch, watch: Callable[..., None]) -> None:
    """Let `watch` see every pass of the policy, before it runs."""
    advance = policy.advance

    def watched(token_ids: Any, position_ids: Any, attention: Any, last: Any) -> Any:
        watch(token_ids, attention)
        return advance(token_ids, position_ids, attention, last)

    monkeypatch.setattr(policy, "advance", watched)


# Memory


def test_rows_change_places_with_what_they_hold() -> None:
    narrow, wide = CellShape(1, 1), CellShape(2, 3)
    shape = KVShape(((narrow, wide), (narrow, narrow)), torch.float64, torch.device("cpu"))
    rows = KVRows(shape, num_rows=3, capacity=4)
    assert [tuple(block.shape) for block in rows.blocks.values()] == [(3, 3, 1, 5, 1), (1, 3, 2, 5, 3)]
    for block in rows.blocks.values():
        block[:] = torch.arange(block.numel(), dtype=torch.float64).view_as(block)
    before = [tuple(side.clone() for side in rows.layer(index)) for index in range(2)]
    rows.exchange(0, 3, 2, 2)
    for index, sides in enumerate(before):
        for now, then in zip(rows.layer(index), sides, strict=True):
            assert torch.equal(now[2, :, :3], then[0, :, :3]) and torch.equal(now[0, :, :2], then[2, :, :2])
            assert torch.equal(now[1], then[1])
    rows.exchange(1, 4, 1, 4)
    rows.copy(1, 0, 4)
    for index, sides in enumerate(before):
        for now, then in zip(rows.layer(index), sides, strict=True):
            assert torch.equal(now[1], then[1]) and torch.equal(now[0, :, :4], then[1, :, :4])


def test_columns_are_clean_when_they_are_reached_and_written_ones_stay() -> None:
    cell = CellShape(1, 1)
    rows = KVRows(KVShape(((cell, cell),), torch.float64, torch.device("cpu")), num_rows=2, capacity=700)
    (cells,) = rows.blocks.values()
    cells.fill_(torch.nan)
    rows.reach(3)
    cells[..., :3, :] = 7.0
    rows.reach(2)
    rows.reach(300)
    assert cells[..., :3, :].eq(7).all() and cells[..., 3:300, :].eq(0).all()
    assert cells[..., 600:, :].isnan().all(), "what nobody needs is not touched"
    rows.reach(700)
    assert not cells[..., :700, :].isnan().any()


def test_the_byte_budget_gives_the_number_of_slots(
    policy: TalkativePolicy, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = KVShape.of(policy)
    assert shape.cells == ((CellShape(1, 8), CellShape(1, 8)),) * 2 and shape.dtype == torch.float64
    assert shape.bytes_per_token == 2 * 2 * 1 * 8 * 8
    widths = []
    spy(policy, monkeypatch, lambda tokens, attention: widths.append(len(getattr(attention, "_row", ()))))
    row_gib = shape.bytes_per_token * TALK_LIMITS.max_tokens / 2**30
    run_engine(SlotEngine(kv_cache_gib=5.5 * row_gib), policy, word_codec, talk_requests(word_codec, 6), TALK_LIMITS)
    assert max(widths) == 5


def test_a_budget_for_less_than_one_rollout_is_refused(policy: TalkativePolicy, word_codec: TokenCodec) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_gib is 1e-06, but one rollout of up to 90 tokens takes .* GiB"):
        run_engine(SlotEngine(kv_cache_gib=1e-6), policy, word_codec, talk_requests(word_codec, 1), TALK_LIMITS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_gib": 0.0}, "kv_cache_gib has to be above 0"),
        ({"max_slots": 0}, "max_slots and max_prefill_tokens at least 1"),
        ({"overlap_steps": -1}, "overlap_steps: expected 0 or more, or null, found -1"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlotEngine(**options)


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine()])
def test_a_context_that_the_model_does_not_read_is_refused(engine: Any, word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec)
    policy.model.config.max_position_embeddings = 80
    with pytest.raises(ConfigError, match="rollout.max_tokens is 90, but the model reads 80 tokens at most"):
        run_engine(engine, policy, word_codec, talk_requests(word_codec, 1), TALK_LIMITS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_halves_the_slots_and_changes_nothing(
    policy: TalkativePolicy, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    requests = talk_requests(word_codec, 5)
    expected = essences(run_engine(SlotEngine(), policy, word_codec, requests, TALK_LIMITS))
    passes = 0

    def exhausted(tokens: Any, attention: Any) -> None:
        nonlocal passes
        passes += len(getattr(attention, "_row", ())) > 0
        if passes > 8 and len(getattr(attention, "_row", ())) > 5:
            raise error

    spy(policy, monkeypatch, exhausted)
    engine = SlotEngine(max_slots=12)
    with pytest.warns(UserWarning, match="Memory ran out in the rollouts with") as told:
        assert essences(run_engine(engine, policy, word_codec, requests, TALK_LIMITS)) == expected
    halved = [str(warning.message).split(". ")[0] for warning in told]
    assert [text.split("with ", 1)[1] for text in halved] == ["12 slots: going on with 6", "6 slots: going on with 3"]
    assert engine.max_slots == 3, "and the next window begins with as many"
    assert essences(run_engine(engine, policy, word_codec, requests, TALK_LIMITS)) == expected


def test_out_of_memory_with_one_slot_stops(
    policy: TalkativePolicy, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(tokens: Any, attention: Any) -> None:
        if hasattr(attention, "_new"):
            raise torch.OutOfMemoryError("CUDA out of memory")

    spy(policy, monkeypatch, exhausted)
    with pytest.raises(RolloutError, match="with a single slot. Lower rollout.max_tokens"):
        run_engine(SlotEngine(max_slots=1), policy, word_codec, talk_requests(word_codec, 1), TALK_LIMITS)


# Trouble with the model


@pytest.mark.parametrize("engine", [SlotEngine(), GenerateEngine()])
def test_logits_that_are_not_finite_stop_the_run(engine: Any, word_codec: TokenCodec) -> None:
    policy = TalkativePolicy(word_codec, seed=1)
    bad = word_codec.encode("capital")[0]
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[bad] = torch.nan  # only one prompt holds this word
    with pytest.raises(RolloutError, match=r"not finite in 3 rollouts .*\(0, 2\)/0, \(0, 2\)/1, \(0, 2\)/2\)"):
        run_engine(engine, policy, word_codec, talk_requests(word_codec, 3), TALK_LIMITS)


def test_a_model_that_cannot_run_in_slots_gets_the_reference_engine() -> None:
    policy = Policy(tiny_model("lfm2", layer_types=["conv", "full_attention"])).eval()
    requests = [make_request(TRAINING_CODEC, index=i) for i in range(2)]
    engine, alone = SlotEngine(max_slots=1), GenerateEngine(1)
    with pytest.warns(UserWarning, match="lfm2 cannot: a layer does more across tokens than attend.*reference") as told:
        first = run_engine(engine, policy, TRAINING_CODEC, requests, TALK_LIMITS)
        second = run_engine(engine, policy, TRAINING_CODEC, requests, TALK_LIMITS)
    assert len(told) == 1, "told once"
    assert (
        essences(first)
        == essences(second)
        == essences(run_engine(alone, policy, TRAINING_CODEC, requests, TALK_LIMITS))
    )
    assert engine.counts.decode_rows > 0


# Searches


class Slow(ToyRetriever):
    """Takes its time, and may tell when it is asked."""

    def __init__(self, seconds: float, before: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.seconds, self.before = seconds, before

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.before()
        time.sleep(self.seconds)
        return super().search(queries, k)


def test_the_schedule_does_not_depend_on_how_long_a_search_takes(word_codec: TokenCodec) -> None:
    policy, requests = TalkativePolicy(word_codec, seed=1), talk_requests(word_codec, 6)
    seen = []
    for seconds in (0.0, 0.02):
        retriever, engine = Slow(seconds), SlotEngine(max_slots=9)
        run_engine(engine, policy, word_codec, requests, TALK_LIMITS, retriever)
        seen.append((retriever.calls, engine.take_counts()))
    assert seen[0] == seen[1] and len(seen[0][0]) > 3


def test_rollouts_decode_while_a_search_is_under_way(
    policy: TalkativePolicy, word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The retriever answers nothing before two more decode steps were made, and is not kept waiting."""
    steps, moved = 0, threading.Condition()

    def step(tokens: Any, attention: Any) -> None:
        nonlocal steps
        with moved:
            steps += len(getattr(attention, "_row", ())) > 0
            moved.notify()

    overlapped, sent, submit = [], [], SearchPool.submit

    def send(pool: SearchPool, queries: Sequence[str]) -> Any:
        sent.append(steps)  # here, since the worker may begin later
        return submit(pool, queries)

    def wait() -> None:
        with moved:
            due = sent[-1] + 2  # one batch is under way at a time
            overlapped.append(moved.wait_for(lambda: steps >= due, timeout=2.0))

    spy(policy, monkeypatch, step)
    monkeypatch.setattr(SearchPool, "submit", send)
    run_engine(
        SlotEngine(overlap_steps=3), policy, word_codec, talk_requests(word_codec, 6), TALK_LIMITS, Slow(0, wait)
    )
    assert overlapped[0] and sum(overlapped) > len(overlapped) / 2, "but for the last ones, when nobody else decodes"


# Work


def test_a_prompt_is_read_once_and_a_row_is_never_idle(word_codec: TokenCodec) -> None:
    policy, requests = TalkativePolicy(word_codec, seed=1), talk_requests(word_codec, 6)
    engine = SlotEngine()
    trajectories = run_engine(engine, policy, word_codec, requests, TALK_LIMITS)
    counts, longest = engine.take_counts(), max(sum(t.policy_mask) for t in trajectories)
    prompts = sum(len(prompt) - 1 for prompt in {request.prompt_ids for request in requests})
    forced = sum(len(span.token_ids) for t in trajectories for span in t.spans[1:] if not span.sampled)
    assert counts.prefill_tokens == prompts + forced
    assert counts.decode_rows == sum(sum(t.policy_mask) for t in trajectories), "one row for each token of the policy"
    assert longest <= counts.steps <= longest + 8 * max(len(t.queries) for t in trajectories)


def test_siblings_that_come_later_copy_the_prompt(word_codec: TokenCodec) -> None:
    policy, requests = TalkativePolicy(word_codec, seed=1), talk_requests(word_codec, 12)
    fed = []
    for slots in (48, 30):  # two groups and a half
        engine = SlotEngine(max_slots=slots)
        run_engine(engine, policy, word_codec, requests, TALK_LIMITS)
        fed.append(engine.take_counts().prefill_tokens)
    assert fed[0] == fed[1]


def test_a_rollout_without_room_ends_at_once() -> None:
    codec, requests, policy = slot_requests("byte", 0, count=4)
    short = replace(SLOT_LIMITS, max_tokens=max(len(r.prompt_ids) for r in requests))
    played = run_engine(SlotEngine(max_slots=2), policy, codec, requests, short)
    assert essences(played) == essences(run_engine(GenerateEngine(), policy, codec, requests, short))
    assert any(len(t.spans) == 1 for t in played)
    assert SlotEngine().max_slots == 256
