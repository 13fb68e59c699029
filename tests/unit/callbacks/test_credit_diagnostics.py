"""CreditDiagnostics: shares and areas by hand, on one rank and two."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.training_rollouts import DIRECT, ONE, TWO, group, rollout
from sdsearch_lightning.callbacks import CreditDiagnostics
from sdsearch_lightning.callbacks.credit_diagnostics import JudgedQuery, judged_queries, ranked_pairs
from sdsearch_lightning.types import Label, RolloutGroup, SpanKind, StepBatch, TokenCredit, Trajectory

RIGHT, WRONG = Label.CORRECT, Label.INCORRECT


def verdict(trajectory: Trajectory, *ratios: float) -> tuple[TokenCredit, ...]:
    """The teacher's on each query, with this mean log ratio over its tokens."""
    spans = [(i, span) for i, span in enumerate(trajectory.spans) if span.kind is SpanKind.QUERY]
    found = []
    for (i, span), ratio in zip(spans, ratios, strict=True):
        n = len(span.token_ids)
        student = tuple(-1.0 - j for j in range(n))
        teacher = tuple(s + ratio + (j - (n - 1) / 2) for j, s in enumerate(student))
        found.append(TokenCredit(i, (0.0,) * n, student, teacher, ((),) * n))
    return tuple(found)


def worth(trajectory: Trajectory, *values: float) -> Trajectory:
    return replace(trajectory, query_credit=values)


def step() -> tuple[list[RolloutGroup], list[list[tuple[TokenCredit, ...] | None]]]:
    """A mixed group of four queries, and one without a CORRECT rollout."""
    mixed = group(
        worth(rollout(TWO, 0, label=RIGHT), 1.0, 0.0),
        worth(rollout(ONE, 1, label=WRONG), 1.0),
        worth(rollout(ONE, 2, label=WRONG), 0.0),
        rollout(DIRECT, 3, label=WRONG),
    )
    wrong = group(*(worth(rollout(ONE, i, label=WRONG, position=1), value) for i, value in enumerate((1.0, 0.0))))
    ratios = [[(0.5, -0.2), (0.1,), (0.3,)], [(0.2,), (0.2,)]]
    groups = [mixed, wrong]
    credit = [
        [verdict(t, *r) for t, r in zip(g.trajectories, rows, strict=False)]
        for g, rows in zip(groups, ratios, strict=True)
    ]
    return groups, [[*credit[0], None], credit[1]]


def logged(callback: CreditDiagnostics, times: int = 1) -> dict[str, float]:
    """What it logs where `times` ranks saw the same."""
    groups, credit = step()
    batch = StepBatch([g.question for g in groups], [g.instance_id for g in groups])
    batch.groups, batch.hindsight = tuple(groups), (None, None)
    batch.credit = tuple(tuple(row) for row in credit)
    found: dict[str, float] = {}
    module: Any = SimpleNamespace(
        sum_over_ranks=lambda values: times * values, log_dict=lambda metrics, **_: found.update(metrics)
    )
    callback.on_train_batch_end(None, module, None, batch, 0)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_good_queries_stand_and_who_knows_them(ranks: int) -> None:
    assert logged(CreditDiagnostics(), ranks) == {
        "credit/good_in_incorrect": 2 / 3,  # of three good queries, one is in the CORRECT rollout
        "credit/lucky_in_correct": 1 / 2,
        "credit/auc_mixed": 3 / 4,  # .5 and .1 against -.2 and .3
        "credit/auc_all_incorrect": 1 / 2,  # a tie
    }


def test_evidence_of_ones_own_overrules_the_runs_credit() -> None:
    class All:
        def assign(self, group):  # type: ignore[no-untyped-def]
            return [[1.0] * len(t.queries) for t in group.trajectories]

    found = logged(CreditDiagnostics(All()))  # type: ignore[arg-type]
    assert found == {"credit/good_in_incorrect": 4 / 6, "credit/lucky_in_correct": 0.0}


def test_without_credit_a_gold_answer_in_the_passages_counts() -> None:
    groups, _ = step()
    bare = [replace(g, trajectories=tuple(replace(t, query_credit=None) for t in g.trajectories)) for g in groups]
    found = list(judged_queries(bare, None, None))
    assert len(found) == 6 and all(query.is_good and query.log_ratio is None for query in found), "Rome is in a passage"
    failed = rollout(ONE, label=None)
    assert list(judged_queries([group(failed)], None, None)) == []


def test_the_area_is_that_of_the_roc_curve() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randint(-3, 4, (40,), generator=generator).double()
    good = torch.rand(40, generator=generator) < 0.4
    won, pairs = ranked_pairs(
        [JudgedQuery("mixed", True, bool(g), float(r)) for g, r in zip(good, ratios, strict=True)]
    )
    by_hand = sum(
        1.0 if a > b else 0.5 if a == b else 0.0 for a in ratios[good].tolist() for b in ratios[~good].tolist()
    )
    assert pairs == int(good.sum()) * int((~good).sum()) and won == by_hand != by_hand + 0.5
    assert ranked_pairs([]) == (0.0, 0)
