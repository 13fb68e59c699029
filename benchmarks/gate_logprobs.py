"""What the teacher thinks of the sampled queries, with and without the taught rollout's own entry in its block.

With it, a teacher may simply find the query in its prompt, label and all; what is left without is its judgement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from sdsearch_lightning.callbacks.credit_diagnostics import JudgedQuery, judged_queries, ranked_pairs
from sdsearch_lightning.hindsight import LeaveOneOut, QueriesAndLabels
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.step.collate import collate, split_groups, weigh
from sdsearch_lightning.step.credit import Credits, credit_rollouts, credit_table
from sdsearch_lightning.types import HindsightBlock, InstanceId, RolloutGroup


@dataclass(frozen=True, slots=True)
class QueryLogprobs:
    """Of the query tokens that both teachers have read; log-probs are means over tokens, in nats."""

    tokens: int
    queries: int
    correct_queries: int
    """Those of CORRECT rollouts."""
    student: float
    teacher_with_own: float
    teacher_without_own: float
    auc_with_own: float | None
    """Share of pairs, a query of a CORRECT and one of an INCORRECT rollout, in which the first has the higher mean
    log T/S; None where there is no pair."""
    auc_without_own: float | None


def query_logprobs(module: SDSearchModule, groups: Sequence[RolloutGroup]) -> QueryLogprobs | None:
    """Student and both teachers on the sampled queries; None where no query has both.

    Args:
        module: in eval mode, with its precision set.
        groups: mixed ones.
    """
    own, others = (
        _verdicts(module, groups, builder.build(groups, "all", module.protocol, module.codec))
        for builder in (QueriesAndLabels(), LeaveOneOut())
    )
    shared = _spans(own) & _spans(others)
    own, others = _only(own, shared), _only(others, shared)
    judged = [_judged(groups, found) for found in (own, others)]
    if not shared:
        return None
    return QueryLogprobs(
        tokens=sum(len(verdict.student_logprob) for credits in own.values() for verdict in credits),
        queries=len(judged[0]),
        correct_queries=sum(query.is_correct for query in judged[0]),
        student=fmean(v for credits in own.values() for verdict in credits for v in verdict.student_logprob),
        teacher_with_own=_teacher_mean(own),
        teacher_without_own=_teacher_mean(others),
        auc_with_own=_auc(judged[0]),
        auc_without_own=_auc(judged[1]),
    )


@torch.no_grad()
def _verdicts(
    module: SDSearchModule, groups: Sequence[RolloutGroup], blocks: Sequence[HindsightBlock | None]
) -> Credits:
    layout, dtype = module.policy.layout, module.policy.dtype
    found = Credits()
    weighed = weigh(groups, blocks, module.aggregation, module.aggregation_norm, dtype=dtype)
    for rollouts in split_groups(weighed, module.max_micro_batch_tokens, layout.size):
        micro = collate(rollouts, module.teacher_prompt, dtype=dtype, cut_teacher=layout.cuts_teacher)
        micro = micro.to(module.device)
        if micro.teacher is None:
            continue
        credit = module.student_step(micro, module.teacher_step(micro)).credit
        assert credit is not None, "there is a teacher"
        found |= credit_rollouts(rollouts, micro.taught, credit)
    return found


def _spans(credits: Credits) -> set[tuple[tuple[InstanceId, int], int]]:
    return {(key, verdict.span) for key, verdicts in credits.items() for verdict in verdicts}


def _only(credits: Credits, spans: set[tuple[tuple[InstanceId, int], int]]) -> Credits:
    return {key: tuple(v for v in verdicts if (key, v.span) in spans) for key, verdicts in credits.items()}


def _teacher_mean(credits: Credits) -> float:
    return fmean(v for verdicts in credits.values() for verdict in verdicts for v in verdict.teacher_logprob)


def _judged(groups: Sequence[RolloutGroup], credits: Credits) -> list[JudgedQuery]:
    """The queries that the teacher has read; a good one is that of a CORRECT rollout here."""
    queries = judged_queries(groups, credit_table(groups, credits), None)
    return [query._replace(is_good=query.is_correct) for query in queries if query.log_ratio is not None]


def _auc(queries: Sequence[JudgedQuery]) -> float | None:
    won, pairs = ranked_pairs(queries)
    return won / pairs if pairs else None
