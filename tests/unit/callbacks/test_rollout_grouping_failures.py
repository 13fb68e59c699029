"""RolloutGrouping where searches fail, and what a user can get wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.grouping_runs import (
    PARIS,
    GroupingModule,
    GroupingRun,
    grouping_run,
    rollouts_in,
    search_then,
)
from helpers.passages import ToyRetriever
from helpers.players import ScriptedEngine
from sdsearch_lightning.callbacks import CreditDiagnostics, RolloutGrouping
from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.scoring.advantages import group_relative
from sdsearch_lightning.scoring.query_credit import SupportEvidence
from sdsearch_lightning.types import (
    Question,
    StopReason,
)

# Failures


def poison(query: str) -> Callable[[Sequence[str]], None]:
    def fail(queries: Sequence[str]) -> None:
        if query in queries:
            raise ConnectionError("the index is gone")

    return fail


def test_a_failed_search_is_counted_and_not_judged(word_codec: TokenCodec) -> None:
    turns = [search_then("Paris"), ["<search> Italy </search>"], ["<answer> Rome </answer>"], search_then("Paris")]
    run = grouping_run(
        word_codec,
        lambda request: turns[request.rollout_index],
        ToyRetriever(fail=poison("Italy")),
        max_error_fraction=0.25,
    )
    (group,) = run.train([PARIS]).groups or ()
    broken = group.trajectories[1]
    assert (broken.stop_reason, broken.label, broken.advantage) == (StopReason.RETRIEVAL_ERROR, None, 0.0)
    judged = [t for t in group.trajectories if t is not broken]
    expected = group_relative(torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64))[0]  # a baseline of three
    assert [t.advantage for t in judged] == expected.tolist()
    logged = run.module.logged
    assert (logged["search/queries"], logged["search/unique"], logged["search/errors"]) == (3, 2, 1)
    assert logged["rollout/retrieval_error_rate"] == 0.25


def test_a_group_of_failures_teaches_nothing(word_codec: TokenCodec) -> None:
    run = grouping_run(
        word_codec, lambda request: search_then("Paris"), ToyRetriever(fail=poison("capital")), max_error_fraction=1
    )
    (group,) = run.train([PARIS]).groups or ()
    assert [(t.label, t.advantage) for t in group.trajectories] == [(None, 0.0)] * 4
    assert not group.has_signal and not group.is_mixed


def test_too_many_failures_stop_the_run(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec, lambda request: search_then("Paris"), ToyRetriever(fail=poison("capital")))
    with pytest.raises(RolloutError) as caught:
        run.train([PARIS])
    assert str(caught.value) == (
        "4 of 4 rollouts ended in a retrieval error; rollout.max_error_fraction allows 20%. Last error: "
        "ConnectionError: the index is gone (query 'capital'). Check data.retriever, then run the same command again: "
        "it resumes from the last checkpoint."
    )


@pytest.mark.parametrize(("allowed", "stops"), [(0.24, True), (0.25, False)])
def test_the_share_of_failures_is_that_of_all_ranks(word_codec: TokenCodec, allowed: float, stops: bool) -> None:
    """Both rollouts of this rank failed, and none of the six elsewhere."""
    run = grouping_run(word_codec, lambda request: search_then("a"), ToyRetriever(fail=poison("capital")), group_size=2)
    run.callback.max_error_fraction = allowed
    run.module.sum_over_ranks = lambda values: values + (torch.tensor([0, 6]) if values.dim() else 0)  # type: ignore[method-assign]
    if stops:
        with pytest.raises(RolloutError, match="2 of 8 rollouts"):
            run.train([PARIS])
    else:
        run.train([PARIS])


# What a user can get wrong


def test_a_group_of_one_is_warned_of(word_codec: TokenCodec) -> None:
    with pytest.warns(UserWarning, match=r"rollout.group_size is 1: .* Use 2 or more\."):
        run = grouping_run(word_codec, group_size=1)
    assert [t.advantage for t in rollouts_in(run.train([PARIS]))] == [0.0]
    GroupingRun(RolloutGrouping(group_size=1), GroupingModule(word_codec), stage="validate")  # there it is no mistake


def test_a_prompt_beyond_the_budget_is_warned_of_once(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec, max_tokens=4, group_size=2)
    with pytest.warns(UserWarning) as caught:
        batch = run.train([PARIS, Question("long", "who where is ?", ("a",))])
        run.train([PARIS])
    assert [str(warning.message) for warning in caught] == [
        f"Question {identity}: its prompt has 5 tokens, rollout.max_tokens allows 4 for a whole rollout. "
        "Its rollouts end as MAX_TOKENS without a token."
        for identity in ("1", "long")
    ]
    assert {(t.stop_reason, any(t.policy_mask)) for t in rollouts_in(batch)} == {(StopReason.MAX_TOKENS, False)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"rollout.temperature: .* has to be above 0, found 0.0"),
        ({"temperature": -1.0}, r"rollout.temperature: .* found -1.0"),
        ({"top_p": 0.0}, r"rollout.top_p: expected above 0 and at most 1, found 0.0"),
        ({"top_p": 1.5}, r"rollout.top_p: .* found 1.5"),
        ({"group_size": 0}, "group_size and top_k have to be at least 1, found 0 and 3"),
        ({"top_k": 0}, "found 5 and 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RolloutGrouping(**options)


@pytest.mark.parametrize("datamodule", [SimpleNamespace(), SimpleNamespace(retriever=None)])
def test_without_a_retriever_there_is_nothing_to_search(word_codec: TokenCodec, datamodule: object) -> None:
    trainer: Any = SimpleNamespace(datamodule=datamodule)
    with pytest.raises(ConfigError, match=r"data.retriever is empty: rollouts need something to search\. Set it, or"):
        RolloutGrouping().setup(trainer, GroupingModule(word_codec), "fit")  # type: ignore[arg-type]


def test_credit_that_no_question_can_earn_is_refused_at_start(word_codec: TokenCodec) -> None:
    retriever = ToyRetriever()
    bare: Any = SimpleNamespace(datamodule=SimpleNamespace(retriever=retriever, training_questions=[PARIS]))
    some = SimpleNamespace(
        datamodule=SimpleNamespace(retriever=retriever, training_questions=[PARIS, replace(PARIS, support=("Paris",))])
    )
    module: Any = GroupingModule(word_codec)
    callbacks = (lambda: RolloutGrouping(credit=SupportEvidence()), lambda: CreditDiagnostics(SupportEvidence()))
    for made in callbacks:
        with pytest.raises(ConfigError, match=r"SupportEvidence: expected training questions .* found none among 1\."):
            made().setup(bare, module, "fit")
        for trainer, stage in ((some, "fit"), (bare, "validate")):
            callback: Any = made()
            callback.setup(trainer, module, stage)
            callback.teardown(trainer, module, stage)


def test_a_retriever_that_breaks_the_contract_is_refused_at_start(word_codec: TokenCodec) -> None:
    with pytest.raises(ConfigError, match=r"Broken.search\(queries, k=2\) was tried with 2 queries"):
        GroupingRun(
            RolloutGrouping(top_k=2), GroupingModule(word_codec), type("Broken", (), {"search": lambda *_: None})()
        )


def test_the_worker_stops_with_the_run(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec)
    pool = run.callback._searches
    run.callback.setup(run.trainer, run.module, "validate")  # type: ignore[arg-type]
    assert run.callback._searches is pool is not None  # `fit` validates with the same worker
    run.callback.teardown(run.trainer, run.module, "fit")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(["late"])
    assert isinstance(run.callback.engine, Engine)


def test_a_reward_that_cannot_be_used_is_told_before_the_first_rollout(word_codec: TokenCodec) -> None:
    class Blank:
        def score(self, trajectory: Any) -> float:
            return float("nan")

    def turns(request: Any) -> list[str]:
        raise AssertionError("no rollout was meant to run")

    run = grouping_run(word_codec, turns, ToyRetriever(), reward=Blank())
    with pytest.raises(ConfigError, match="rollout.reward Blank.score: expected a finite number"):
        run.train([PARIS])


# A policy that never acts


@pytest.mark.parametrize("turns, told", [([], 1), (["<answer> Rome </answer>"], 0), (["<search> Rome </search>"], 0)])
def test_a_policy_that_never_acts_is_told_of_the_cold_start_once(
    word_codec: TokenCodec, turns: list[str], told: int
) -> None:
    engine = ScriptedEngine(lambda request: turns or ["where is it"] * 9)
    run = GroupingRun(RolloutGrouping(group_size=12, top_k=2, max_tokens=60, engine=engine), GroupingModule(word_codec))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            run.train([PARIS])
        few = [w for w in seen if "None of the first" in str(w.message)]
        for _ in range(3):
            run.train([PARIS])
    assert not few, "24 rollouts are few"
    assert (
        len([w for w in seen if "None of the first 36 rollouts holds a search or an answer" in str(w.message)]) == told
    )
