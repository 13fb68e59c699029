"""From groups to tensors: which token gets which weight, and that no split, order or rank changes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from helpers.players import play
from helpers.training_rollouts import (
    DIRECT,
    ONE,
    TRAINING_CODEC,
    TRAINING_LIMITS,
    TRAINING_PROTOCOL,
    TRAINING_QUESTION,
    TWO,
    blocks_of,
    group,
    rollout,
    three_groups,
)
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.policy.packing import LAYOUTS
from sdsearch_lightning.protocol.conversation import Conversation
from sdsearch_lightning.step.collate import SearchBatch, WeightedRollout, collate, filler, split_groups, weigh
from sdsearch_lightning.types import Label, RolloutGroup, RolloutRequest, Trajectory

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def teacher_prompt(trajectory: Trajectory, block_text: str) -> Sequence[int]:
    return TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, trajectory.question.text, block_text)


def flat(groups: Sequence[Sequence[WeightedRollout]]) -> list[WeightedRollout]:
    return [rollout for group in groups for rollout in group]


def collated(groups: Sequence[RolloutGroup]) -> SearchBatch:
    weighed = weigh(groups, blocks_of(groups), "token-mean", dtype=torch.float64)
    return collate(flat(weighed), teacher_prompt, dtype=torch.float64)


def test_a_rollout_drawn_as_tokens() -> None:
    batch = collated([group(rollout(ONE, advantage=-0.5))])
    table = [
        # token      hand, position in the query
        ("where", "prompt"), ("is", "prompt"), ("Rome", "prompt"), ("Rome", "prompt"),
        ("<think>", "policy"), ("where", "policy"), ("</think>", "policy"),
        ("<search>", "policy"), ("capital", "query"), ("of", "query"), ("Italy", "query"), ("</search>", "policy"),
        *((word, "forced") for word in "<documents> Rome is the capital of Italy".split()),
        *((word, "forced") for word in "Oslo is the capital of Norway </documents>".split()),
        ("<answer>", "policy"), ("Rome", "policy"), ("</answer>", "policy"),
    ]  # fmt: skip
    assert TRAINING_CODEC.decode(batch.token_ids.tolist()).split() == [word for word, _ in table]
    hands = [hand for _, hand in table]
    counted = [hand in ("policy", "query") for hand in hands]
    assert (batch.policy_weight != 0).tolist() == counted
    torch.testing.assert_close(batch.policy_weight, torch.tensor(counted).double() / sum(counted), rtol=0, atol=1e-15)
    assert batch.query_row.tolist() == [i for i, hand in enumerate(hands) if hand == "query"]
    assert (batch.sampled_logprobs != 0).tolist() == counted
    assert set(batch.advantages.tolist()) == {-0.5}
    assert batch.sequences.position_ids.tolist() == list(range(len(table)))


def test_tokens_and_logprobs_are_those_of_the_rollouts() -> None:
    groups = three_groups()
    batch = collated(groups)
    judged = [t for g in groups for t in g.trajectories if t.label is not None]
    assert batch.token_ids.tolist() == [token for t in judged for token in t.token_ids]
    assert batch.sampled_logprobs.tolist() == [value for t in judged for value in t.sampled_logprobs]
    assert batch.advantages.tolist() == [t.advantage for t in judged for _ in t.token_ids]
    lengths = [len(t.token_ids) for t in judged]
    assert batch.sequences.sequence_index.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert batch.sequences.position_ids.tolist() == [p for n in lengths for p in range(n)]


def test_pad_and_end_of_sequence_ids_that_the_policy_wrote_keep_their_weight() -> None:
    conversation = Conversation(
        RolloutRequest(TRAINING_QUESTION, (0, 0), 0, (4, 5), 0), TRAINING_PROTOCOL, TRAINING_CODEC, TRAINING_LIMITS
    )
    written = replace(play(conversation, TRAINING_CODEC, f"<pad> <eos> {DIRECT}"), advantage=1.0, label=Label.CORRECT)
    batch = collated([group(written)])
    assert batch.token_ids.tolist()[2:4] == [TRAINING_CODEC.tokenizer.pad_token_id, TRAINING_CODEC.eos_id]
    assert batch.policy_weight[2:4].ne(0).all()
    assert batch.sequences.position_ids.tolist() == list(range(len(written.token_ids)))


# Weights


@pytest.mark.parametrize("mode", MODES)
def test_policy_weights_by_hand(mode: str) -> None:
    groups = three_groups()
    judged = [t for g in groups for t in g.trajectories if t.label is not None]
    counts = [sum(t.policy_mask) for t in judged]
    for weighed in flat(weigh(groups, [None] * 3, mode, norm=50.0, dtype=torch.float64)):
        expected = {
            MODES[0]: 1 / sum(counts),
            MODES[1]: 1 / len(judged) / sum(weighed.trajectory.policy_mask),
            MODES[2]: 1 / len(judged) / 50,
        }[mode]
        wanted = torch.tensor(weighed.trajectory.policy_mask).double() * expected
        torch.testing.assert_close(weighed.policy_weight, wanted, rtol=0, atol=1e-15)


def test_query_weights_by_hand() -> None:
    groups = three_groups()
    weighed = weigh(groups, blocks_of(groups, "sqrt"), "token-mean")
    sqrt = 2 * (1 / 3 * 2 / 3) ** 0.5
    # five judged rollouts have queries, of three tokens each; the group without contrast is not taught, yet counts
    expected = [[sqrt / 3 / 5, sqrt / 3 / 5, 0], [0, 0, 0], [1 / 3 / 5, 0]]
    assert [[r.query_weight for r in g] for g in weighed] == [pytest.approx(row, abs=1e-15) for row in expected]


def test_a_rollout_that_the_retriever_failed_weighs_nothing_and_counts_nowhere() -> None:
    groups = three_groups()
    kept = [RolloutGroup(g.question, g.instance_id, tuple(t for t in g.trajectories if t.label)) for g in groups]
    for mode in MODES:
        with_error = flat(weigh(groups, blocks_of(groups), mode, norm=9.0))
        without = flat(weigh(kept, blocks_of(kept), mode, norm=9.0))
        assert [r.query_weight for r in with_error] == [r.query_weight for r in without]
        assert all(torch.equal(a.policy_weight, b.policy_weight) for a, b in zip(with_error, without, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shares", [([0], [1, 2]), ([0, 1, 2], []), ([2], [1], [0])])
def test_ranks_that_add_up_their_counts_weigh_as_one(mode: str, shares: tuple[list[int], ...]) -> None:
    groups = three_groups()
    blocks = blocks_of(groups)
    joint = weigh(groups, blocks, mode, norm=20.0)
    counts: list[Tensor] = []

    def weigh_share(share: list[int], total: Tensor | None) -> list[list[WeightedRollout]]:
        def sum_over_ranks(local: Tensor) -> Tensor:
            counts.append(local)
            return local if total is None else total

        return weigh([groups[i] for i in share], [blocks[i] for i in share], mode, 20.0, sum_over_ranks)

    for share in shares:
        weigh_share(share, None)
    assert len(counts) == len(shares), "one collective on every rank, whatever it holds"
    total = torch.stack(counts).sum(0)
    for share in shares:
        for mine, theirs in zip(flat(weigh_share(share, total)), flat([joint[i] for i in share]), strict=True):
            assert mine.query_weight == theirs.query_weight
            torch.testing.assert_close(mine.policy_weight, theirs.policy_weight, rtol=1e-6, atol=0)


def test_a_row_sum_norm_over_ranks_needs_its_norm() -> None:
    with pytest.raises(ConfigError, match="over several ranks needs norm"):
        weigh(three_groups(), [None] * 3, "seq-mean-token-sum-norm", None, lambda counts: counts)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown aggregation mode 'mean'"):
        weigh(three_groups(), [None] * 3, "mean")  # type: ignore[arg-type]


# Micro-batches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_tokens", [1, 60, 140, 240, 10_000])
def test_micro_batches_hold_whole_groups_within_the_budget(max_tokens: int, layout: str) -> None:
    """The budget is in tokens that the body computes: padding counts where there is some."""
    weighed = weigh(three_groups(), [None] * 3, "token-mean")
    batches = split_groups(weighed, max_tokens, LAYOUTS[layout].size)
    assert sorted(id(r) for b in batches for r in b) == sorted(id(r) for r in flat(weighed))
    for g in weighed:
        assert any({id(r) for r in g} <= {id(r) for r in b} for b in batches), "a group is never split"
    for b in batches:
        lengths = [len(r.trajectory.token_ids) for r in b]
        tokens = len(b) * max(lengths) if layout == "padded" else sum(lengths)
        assert tokens <= max_tokens or len({r.trajectory.instance_id for r in b}) == 1
    padded = {1: 3, 60: 3, 140: 3, 240: 2, 10_000: 1}
    assert len(batches) == (padded if layout == "padded" else padded | {140: 2, 240: 1})[max_tokens]
    if layout != "padded":
        assert [[id(r) for r in b] for b in batches] == [[id(r) for r in b] for b in split_groups(weighed, max_tokens)]


def test_a_step_without_any_rollout_to_learn_from_has_no_micro_batch() -> None:
    failed = [group(rollout(ONE, label=None), rollout(TWO, 1, label=None))]
    assert blocks_of(failed) == [None]
    weighed = weigh(failed, [None], "token-mean")
    assert weighed == [[]]
    assert split_groups(weighed, 100) == []


def test_a_filler_weighs_nothing() -> None:
    batch = filler(torch.float64)
    assert batch.policy_weight.dtype == torch.float64
    assert not batch.policy_weight.any() and len(batch.query_row) == len(batch.query_weight) == 0
    assert batch.teacher is None


def test_a_batch_moves_as_a_whole() -> None:
    batch = replace(collated(three_groups()), on_policy=True)
    moved = batch.to("meta")
    assert moved.on_policy and moved.teacher is not None and moved.teacher_query_row is not None
    for owner in (moved, moved.sequences, moved.teacher):
        tensors = {f.name: getattr(owner, f.name) for f in fields(owner)}
        left = [name for name, value in tensors.items() if isinstance(value, Tensor) and value.device.type != "meta"]
        assert left == []
    assert moved.sequences.max_length == batch.sequences.max_length
