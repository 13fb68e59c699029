"""Decode steps of fixed sizes, with a plain call in place of a recording: rollouts stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.models import TalkativePolicy
from helpers.slots import TALK_LIMITS, essences, run_engine, talk_requests
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import SlotEngine
from sdsearch_lightning.rollout.decode_graphs import PATIENCE, DecodeGraphs, Step
from sdsearch_lightning.rollout.kv_rows import KVRows, KVShape


class Recorder:
    """Stands in for CUDA graphs: keeps what it was given to record, and how often each recording was replayed."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.replays = fails, []

    def __call__(self, step: Step, pool: Any) -> Step:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        index = len(self.replays)
        self.replays.append(0)

        def replay() -> torch.Tensor:
            self.replays[index] += 1
            return step()

        return replay


def recording(recorder: Recorder, **options: Any) -> SlotEngine:
    engine = SlotEngine(**options)
    engine._capture = recorder
    return engine


@pytest.mark.parametrize("slots", [3, 7, 32])
def test_rollouts_stay_the_same(slots: int, word_codec: TokenCodec) -> None:
    policy, requests = TalkativePolicy(word_codec), talk_requests(word_codec, 8)
    plain = SlotEngine(max_slots=slots)
    expected = run_engine(plain, policy, word_codec, requests, TALK_LIMITS)
    recorder = Recorder()
    engine = recording(recorder, max_slots=slots)
    found = run_engine(engine, policy, word_codec, requests, TALK_LIMITS)
    assert essences(found) == essences(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.sampled_logprobs), torch.tensor(other.sampled_logprobs), rtol=0, atol=1e-12
        )
    assert recorder.replays and min(recorder.replays) > 0
    assert engine.counts.decode_rows == plain.counts.decode_rows
    assert engine.counts.prefill_tokens == plain.counts.prefill_tokens


def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(word_codec: TokenCodec) -> None:
    policy, requests = TalkativePolicy(word_codec), talk_requests(word_codec, 4)
    expected = run_engine(SlotEngine(), policy, word_codec, requests, TALK_LIMITS)
    with pytest.warns(UserWarning, match=r"cannot be recorded as CUDA graphs \(operation not permitted") as caught:
        found = run_engine(recording(Recorder(fails=True)), policy, word_codec, requests, TALK_LIMITS)
    assert essences(found) == essences(expected) and len(caught) == 1


def test_sizes_are_few_and_fit_the_rows(word_codec: TokenCodec) -> None:
    rows = KVRows(KVShape.of(TalkativePolicy(word_codec)), num_rows=100, capacity=700)
    graphs = DecodeGraphs(TalkativePolicy(word_codec), rows, Recorder())
    sizes = {graphs._size(a, c) for a in range(1, 101) for c in range(1, 701)}
    assert {rows for rows, _ in sizes} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100}
    assert {cells for _, cells in sizes} == {256, 512, 700}
    assert all(graphs._size(a, 1)[0] >= a for a in range(1, 101))


def test_rows_too_many_leave_the_others_alone(word_codec: TokenCodec) -> None:
    """A step of five rows computes six; the sixth holds a rollout that waits, and none of its cells may change."""
    policy = TalkativePolicy(word_codec)
    rows = KVRows(KVShape.of(policy), num_rows=6, capacity=40)
    rows.reach(40)
    for block in rows.blocks.values():
        block[..., :40, :] = torch.randn_like(block[..., :40, :])
    before = [block.clone() for block in rows.blocks.values()]
    graphs = DecodeGraphs(policy, rows, Recorder())
    with torch.no_grad():
        for _ in range(PATIENCE + 2):
            assert len(graphs.advance(torch.tensor([1, 2, 3, 4, 5]), [7, 3, 0, 9, 38])) == 5
    for block, old in zip(rows.blocks.values(), before, strict=True):
        assert torch.equal(block[:, 5, :, :40], old[:, 5, :, :40])
        assert not torch.equal(block[:, 0, :, 7], old[:, 0, :, 7])
