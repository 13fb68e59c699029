"""Who is taught where: spans, views, and the tokens they judge."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.training import make_module, micro_batches, step
from helpers.training_rollouts import ONE, TRAINING_CODEC, TRAINING_PROTOCOL, TWO, blocks_of, group, rollout
from helpers.trajectories import query_mask
from sdsearch_lightning.step.taught_spans import distilled_spans, find_taught_spans, num_distilled_tokens
from sdsearch_lightning.types import HindsightBlock, SpanKind, TeacherView


def kinds(trajectory, spans):
    return [trajectory.spans[index].kind for index in spans]


def test_queries_alone_or_all_that_the_policy_wrote():
    two = rollout(TWO)
    assert kinds(two, distilled_spans(two, "queries")) == [SpanKind.QUERY, SpanKind.QUERY]
    assert num_distilled_tokens(two, "queries") == sum(query_mask(two)) == 3
    wrote = kinds(two, distilled_spans(two, "policy"))
    assert SpanKind.OBSERVATION not in wrote and SpanKind.PROMPT not in wrote and SpanKind.ANSWER in wrote
    assert num_distilled_tokens(two, "policy") == sum(two.policy_mask)


def test_a_block_without_views_is_read_by_every_rollout():
    groups = [group(rollout(ONE), rollout(TWO, 1))]
    (block,) = blocks_of(groups)
    taught = find_taught_spans([(t, block) for t in groups[0].trajectories], "queries")
    assert [(x.rollout, x.block_text, len(x.spans)) for x in taught] == [(0, block.text, 1), (1, block.text, 2)]
    assert find_taught_spans([(t, None) for t in groups[0].trajectories], "queries") == ()


def test_a_view_is_for_one_rollout_and_one_query():
    first, second = rollout(TWO), rollout(TWO, 1)
    views = (TeacherView(1, 0, "a"), TeacherView(1, 1, "b"))
    block = HindsightBlock((0, 0), (), "", views=views)
    taught = find_taught_spans([(first, block), (second, block)], "queries")
    queries = distilled_spans(second, "queries")
    assert [(x.rollout, x.block_text, x.spans) for x in taught] == [(1, "a", queries[:1]), (1, "b", queries[1:])]


def test_each_query_is_judged_by_a_teacher_that_read_its_own_text():
    module, groups = make_module(), [group(rollout(TWO), rollout(ONE, 1))]
    texts = (" siblings CORRECT Rome ;", " siblings INCORRECT Norway ;")
    (plain,) = blocks_of(groups)
    by_query = tuple(TeacherView(0, i, text) for i, text in enumerate(texts))
    (batch,) = micro_batches(module, groups, [replace(plain, views=by_query)])
    assert batch.teacher is not None and batch.teacher.num_sequences == 2
    found = step(module, batch).credit.teacher_logprob
    for text, part in zip(texts, ((0, 2), (2, 3)), strict=True):
        (whole,) = micro_batches(module, groups, [replace(plain, views=(TeacherView(0, None, text),))])
        expected = step(module, whole).credit.teacher_logprob
        assert torch.allclose(found[slice(*part)], expected[slice(*part)], rtol=0, atol=1e-12)
        assert not torch.allclose(found[slice(*part)], expected[slice(*part)] + 1e-6, rtol=0, atol=1e-12)


def test_views_that_overlap_are_refused():
    groups = [group(rollout(ONE))]
    (block,) = blocks_of(groups)
    twice = replace(block, views=(TeacherView(0, None, "a"), TeacherView(0, 0, "b")))
    with pytest.raises(AssertionError, match="taught twice"):
        micro_batches(make_module(), groups, [twice])


def test_all_positions_teach_more_tokens_with_less_weight_each():
    groups = [group(rollout(TWO), rollout(ONE, 1))]
    module = make_module()
    (queries,) = micro_batches(module, groups, blocks_of(groups))
    from sdsearch_lightning.step.collate import collate, split_groups, weigh

    weighed = weigh(groups, blocks_of(groups), "token-mean", positions="policy", dtype=torch.float64)
    (share,) = split_groups(weighed, 10_000)
    everywhere = collate(
        share,
        lambda t, text: TRAINING_PROTOCOL.prompt_ids(TRAINING_CODEC, t.question.text, text),
        "policy",
        torch.float64,
    )
    assert len(everywhere.query_row) == sum(sum(t.policy_mask) for t in groups[0].trajectories)
    for batch in (queries, everywhere):  # 1 / |Q| per rollout, then the mean over rollouts
        assert batch.query_weight.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert step(module, everywhere).jsd_loss.item() != pytest.approx(step(module, queries).jsd_loss.item(), rel=1e-6)
