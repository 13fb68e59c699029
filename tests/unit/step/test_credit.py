"""The teacher's verdict finds its way back to the query it is about."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.closed_form import logprob_rows
from helpers.training import make_module, micro_batches, step
from helpers.training_rollouts import ONE, TRAINING_CODEC, TWO, blocks_of, group, rollout, three_groups
from sdsearch_lightning.step.collate import split_groups, weigh
from sdsearch_lightning.step.credit import CreditRows, Credits, credit_rollouts, credit_table
from sdsearch_lightning.step.taught_spans import find_taught_spans
from sdsearch_lightning.types import HindsightBlock, RolloutGroup, SpanKind, TokenCredit


def numbered(count: int) -> CreditRows:
    """Row i says i, i + 0.25 and i + 0.5, and names the tokens i and i + 1."""
    rows = torch.arange(count, dtype=torch.float64)
    tops = torch.stack([rows, rows + 1], dim=1)
    return CreditRows(rows, rows + 0.25, rows + 0.5, tops.long(), tops / 100)


def deal(groups: list[RolloutGroup], blocks: list[HindsightBlock | None], rows: int) -> Credits:
    weighed = weigh(groups, blocks, "token-mean")
    rollouts = [r for g in weighed for r in g]
    taught = find_taught_spans([(r.trajectory, r.block) for r in rollouts], "queries")
    return credit_rollouts(rollouts, taught, numbered(rows))


def expected(rows: range, span: int) -> TokenCredit:
    return TokenCredit(
        span,
        tuple(map(float, rows)),
        tuple(i + 0.25 for i in rows),
        tuple(i + 0.5 for i in rows),
        tuple(((i, i / 100), (i + 1, (i + 1) / 100)) for i in rows),
    )


def test_each_row_comes_back_at_its_own_span() -> None:
    groups = three_groups()
    credits = deal(groups, blocks_of(groups, "mixed"), 9)
    table = credit_table(groups, credits)
    two, one = groups[0].trajectories[:2]
    kinds = [span.kind for span in two.spans]
    first, second = (i for i, kind in enumerate(kinds) if kind is SpanKind.QUERY)
    assert [len(two.spans[i].token_ids) for i in (first, second)] == [2, 1]
    assert table[0][0] == (expected(range(2), first), expected(range(2, 3), second))
    assert table[0][1] == (expected(range(3, 6), [s.kind for s in one.spans].index(SpanKind.QUERY)),)
    assert table[2][0] == (expected(range(6, 8), first), expected(range(8, 9), second))


def test_where_there_was_no_teacher_there_is_none() -> None:
    groups = three_groups()
    table = credit_table(groups, deal(groups, blocks_of(groups, "mixed"), 9))
    assert table[1] == (None, None, None), "a group that is not taught"
    assert table[2][1] is None, "a search that failed"
    assert table[0][2] is None, "no search"
    assert credit_table(groups, {}) == ((None,) * 3,) * 3


def test_a_taught_group_of_weight_zero_keeps_its_verdicts() -> None:
    groups = [group(rollout(ONE), rollout(TWO, 1))]
    block = blocks_of(groups)[0]
    assert block is not None
    table = credit_table(groups, deal(groups, [replace(block, weight=0.0)], 6))
    assert [len(verdicts or ()) for verdicts in table[0]] == [1, 2]


def test_rows_left_over_are_a_mistake() -> None:
    groups = [group(rollout(ONE))]
    with pytest.raises(AssertionError, match="every row belongs to a span"):
        deal(groups, blocks_of(groups), 4)


def test_the_verdicts_of_a_step_are_about_their_own_tokens() -> None:
    groups, module = three_groups(), make_module()
    blocks = blocks_of(groups)
    (rollouts,) = split_groups(weigh(groups, blocks, "token-mean"), 10_000)
    (batch,) = micro_batches(module, groups, blocks)
    credit = step(module, batch).credit
    assert credit is not None
    table = credit_table(groups, credit_rollouts(rollouts, batch.taught, credit))
    found = 0
    for g, block, row in zip(groups, blocks, table, strict=True):
        for t, verdicts in zip(g.trajectories, row, strict=True):
            prompt = TRAINING_CODEC.encode(t.question.text + block.text)
            student = logprob_rows(module.policy.model, t.token_ids)
            teacher = logprob_rows(module.policy.model, prompt + t.token_ids[t.prompt_length :])[len(prompt) :]
            for verdict in verdicts or ():
                start = sum(len(span.token_ids) for span in t.spans[: verdict.span])
                assert len(t.spans[verdict.span].token_ids) == len(verdict.jsd)
                for i, token in enumerate(t.spans[verdict.span].token_ids):
                    seen = teacher[start + i - t.prompt_length]
                    assert verdict.student_logprob[i] == pytest.approx(student[start + i, token].item(), abs=1e-12)
                    assert verdict.teacher_logprob[i] == pytest.approx(seen[token].item(), abs=1e-12)
                    assert [token for token, _ in verdict.teacher_top[i]] == seen.topk(5).indices.tolist()
                    assert [p for _, p in verdict.teacher_top[i]] == pytest.approx(seen.topk(5).values.exp().tolist())
                    found += 1
    assert found == 15
