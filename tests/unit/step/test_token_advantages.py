"""One advantage per token: where a search's credit lands, and that without weight nothing of GRPO changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from helpers.training import make_module, micro_batches
from helpers.training_rollouts import DIRECT, TRAINING_PASSAGES, TWO, rollout, three_groups
from sdsearch_lightning.scoring.query_credit import SupportEvidence, assigned
from sdsearch_lightning.step.collate import collate, weigh
from sdsearch_lightning.step.token_advantages import CreditPlacement, token_advantages
from sdsearch_lightning.types import RolloutGroup, SpanKind

CREDITED = replace(rollout(f"<think> where </think> {TWO}", advantage=0.5), query_advantages=(2.0, -1.0))


def by_kind(values: list[float], number: int) -> dict[SpanKind, set[float]]:
    """Values of the spans between the `number`-th observation and the next, by kind."""
    found: dict[SpanKind, set[float]] = {}
    start = observations = 0
    for span in CREDITED.spans:
        if observations == number:
            found.setdefault(span.kind, set()).update(values[start : start + len(span.token_ids)])
        observations += span.kind is SpanKind.OBSERVATION
        start += len(span.token_ids)
    return found


def test_credit_lands_at_the_tokens_of_its_query() -> None:
    values = token_advantages(CREDITED, CreditPlacement(0.25))
    first, second, rest = (by_kind(values, n) for n in range(3))
    assert first[SpanKind.QUERY] == {0.5 + 0.25 * 2} and second[SpanKind.QUERY] == {0.5 - 0.25}
    assert first[SpanKind.REASONING] == first[SpanKind.SCAFFOLD] == second[SpanKind.REASONING] == {0.5}
    assert rest[SpanKind.ANSWER] == {0.5} and len(values) == len(CREDITED.token_ids)


def test_on_request_the_thought_before_it_gets_it_too() -> None:
    values = token_advantages(CREDITED, CreditPlacement(0.25, "turn"))
    first, second, rest = (by_kind(values, n) for n in range(3))
    assert first[SpanKind.QUERY] == first[SpanKind.REASONING] == {1.0} and second[SpanKind.REASONING] == {0.25}
    assert first[SpanKind.PROMPT] == {0.5} == second[SpanKind.OBSERVATION]
    assert rest[SpanKind.ANSWER] == {0.5}
    closing = [i for i, span in enumerate(CREDITED.spans) if span.kind is SpanKind.QUERY][0] + 1
    start = sum(len(span.token_ids) for span in CREDITED.spans[:closing])
    assert values[start] == 0.5, "the tag that closes the query is the form, not the search"


def test_credit_may_be_shared_among_a_querys_tokens() -> None:
    whole, shared = (token_advantages(CREDITED, CreditPlacement(1.0, shared=flag)) for flag in (False, True))
    queries = [span for span in CREDITED.spans if span.kind is SpanKind.QUERY]
    assert len(queries[0].token_ids) > 1
    assert by_kind(shared, 0)[SpanKind.QUERY] == {0.5 + 2.0 / len(queries[0].token_ids)}
    for values in (whole, shared):
        assert sum(values) != pytest.approx(0.5 * len(values))


@pytest.mark.parametrize(
    ("trajectory", "weight"), [(CREDITED, 0.0), (replace(CREDITED, query_advantages=None), 1.0), (rollout(DIRECT), 1.0)]
)
def test_without_credit_every_token_has_the_rollouts(trajectory: object, weight: float) -> None:
    values = token_advantages(trajectory, CreditPlacement(weight))  # type: ignore[arg-type]
    assert values == [trajectory.advantage] * len(trajectory.token_ids)  # type: ignore[attr-defined]


def by_place(group: RolloutGroup) -> list[tuple[float, ...]]:
    return [tuple(0.7 * (i + 1) for i in range(len(t.queries))) for t in group.trajectories]


def by_support(group: RolloutGroup) -> list[tuple[float, ...]]:
    question = replace(group.question, support=(TRAINING_PASSAGES[0].id,))
    values = assigned(SupportEvidence(), replace(group, question=question))
    assert {value for row in values for value in row} <= {0.0, 1.0} and any(map(any, values))
    return values


@pytest.mark.parametrize("worth", [by_place, by_support])
def test_at_weight_0_losses_and_gradients_are_grpos_bit_for_bit(
    worth: Callable[[RolloutGroup], list[tuple[float, ...]]],
) -> None:
    module = make_module()
    plain = three_groups()
    credited = [
        replace(
            g,
            trajectories=tuple(
                replace(t, query_advantages=row) for t, row in zip(g.trajectories, worth(g), strict=True)
            ),
        )
        for g in plain
    ]

    def step(groups: object, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
        rollouts = [r for part in weigh(groups, [None] * 3, "token-mean", dtype=torch.float64) for r in part]  # type: ignore[arg-type]
        batch = collate(rollouts, dtype=torch.float64, credit=CreditPlacement(weight))
        module.zero_grad()
        loss = module.student_step(batch).policy_loss
        loss.backward()
        return loss, torch.cat([w.grad.flatten() for w in module.policy.parameters() if w.grad is not None])

    wanted, off, on = step(plain, 0.0), step(credited, 0.0), step(credited, 1.0)
    assert torch.equal(off[0], wanted[0]) and torch.equal(off[1], wanted[1])
    assert abs(on[0] - wanted[0]) > 1e-4 and (on[1] - wanted[1]).abs().max() > 1e-5
    (batch,) = micro_batches(module, plain)
    assert torch.equal(
        batch.advantages[batch.policy_weight > 0].unique(),
        torch.tensor(sorted({t.advantage for g in plain for t in g.trajectories if t.label}), dtype=torch.float64),
    )
