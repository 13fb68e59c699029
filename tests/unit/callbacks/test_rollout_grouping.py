"""From a batch of questions to scored groups: seeds, scores, failures, and what a user can get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from toys import PROTOCOL, ScriptedEngine, TalkativePolicy, ToyRetriever, Turns

from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.errors import ConfigError, RolloutError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.rollout.progress import RolloutProgress
from sdsearch_lightning.scoring.advantages import group_relative
from sdsearch_lightning.scoring.rewards import ExactMatchReward
from sdsearch_lightning.types import (
    InstanceId,
    Label,
    Question,
    RolloutRequest,
    Sampling,
    StepBatch,
    StopReason,
    Trajectory,
)

PARIS = Question("1", "where is Paris ?", ("Paris",), "nq")
ROME = Question("1", "the city of Rome ?", ("Rome",), "hotpotqa")  # the same id, as Search-R1's index has it
SMALL: dict[str, Any] = {"max_searches": 2, "max_turn_tokens": 12, "max_observation_tokens": 20, "max_tokens": 90}


class Module:
    """What the callback needs of a SDSearchModule, and what it logged."""

    def __init__(self, codec: TokenCodec, policy: nn.Module | None = None) -> None:
        self.codec, self.protocol, self.policy = codec, PROTOCOL, policy or nn.Linear(1, 1)
        self.logged: dict[str, float] = {}
        self.sampler = None

    def log_dict(self, metrics: dict[str, float], **options: object) -> None:
        self.logged |= metrics

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


class Run:
    """A callback between a retriever and a module, set up as a Trainer would."""

    def __init__(self, callback: RolloutGrouping, module: Module, retriever: object = None, stage: str = "fit") -> None:
        self.callback, self.module = callback, module
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            world_size=1,
            is_global_zero=True,
            progress_bar_callback=None,
            precision_plugin=Precision(),
            datamodule=SimpleNamespace(retriever=retriever or ToyRetriever()),
        )
        callback.setup(self.trainer, module, stage)  # type: ignore[arg-type]

    def train(self, questions: Sequence[Question], instance_ids: Sequence[InstanceId] | None = None) -> StepBatch:
        batch = StepBatch(questions, instance_ids)
        self.callback.on_train_batch_start(self.trainer, self.module, batch, 0)  # type: ignore[arg-type]
        return batch

    def evaluate(self, questions: Sequence[Question], instance_ids: Sequence[InstanceId] | None = None) -> StepBatch:
        batch = StepBatch(questions, instance_ids)
        self.callback.on_validation_batch_start(self.trainer, self.module, batch, 0)  # type: ignore[arg-type]
        return batch


def search_then(answer: str) -> Turns:
    return ["<search> capital </search>", f"<answer> {answer} </answer>"]


SCRIPTS = [search_then("Paris"), ["<answer> Rome </answer>"], search_then("Italy"), []]
"""By rollout: right for PARIS, right for ROME, wrong for both, no answer."""


def scripted(
    codec: TokenCodec,
    script: Callable[[RolloutRequest], Turns] = lambda request: SCRIPTS[request.rollout_index],
    retriever: object = None,
    **options: Any,
) -> Run:
    engine = ScriptedEngine(codec, script)
    options = {"group_size": 4, "engine": engine, "reward": ExactMatchReward(), "max_invalid_actions": 0} | options
    return Run(RolloutGrouping(**options), Module(codec), retriever)


def trajectories(batch: StepBatch, slot: str = "groups") -> list[Trajectory]:
    return [t for group in batch.require(slot, by="a test") for t in group.trajectories]


# Groups


def test_rollouts_are_scored_and_grouped(word_codec: TokenCodec) -> None:
    run = scripted(word_codec)
    first, second = run.train([PARIS, ROME]).groups or ()
    assert [t.reward for t in first.trajectories] == [1.0, 0.0, 0.0, 0.0]
    assert [t.reward for t in second.trajectories] == [0.0, 1.0, 0.0, 0.0]
    assert [t.label for t in second.trajectories] == [Label.INCORRECT, Label.CORRECT] + [Label.INCORRECT] * 2
    expected = group_relative(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.float64))
    assert [[t.advantage for t in group.trajectories] for group in (first, second)] == expected.tolist()
    assert [t.rollout_index for t in first.trajectories] == [0, 1, 2, 3]
    assert (first.question, first.instance_id, second.instance_id) == (PARIS, (0, 0), (0, 1))


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("pair", [(PARIS, ROME), (PARIS, PARIS)], ids=["equal ids", "a question twice"])
def test_groups_are_told_apart_by_instance(word_codec: TokenCodec, pair: tuple[Question, Question], scale: Any) -> None:
    """Rewards differ by instance, so that a merged group would show."""

    def script(request: RolloutRequest) -> Turns:
        return SCRIPTS[(request.rollout_index + 2 * request.instance_id[1]) % 3]

    together = scripted(word_codec, script, advantage_scale=scale).train(pair, [(0, 0), (0, 1)])
    apart = [
        scripted(word_codec, script, advantage_scale=scale).train([question], [(0, i)])
        for i, question in enumerate(pair)
    ]
    assert trajectories(together) == [t for batch in apart for t in trajectories(batch)]
    assert [len(group.trajectories) for group in together.groups or ()] == [4, 4]
    assert len({t.reward for t in trajectories(together)}) == 2


def test_the_label_is_independent_of_the_reward(word_codec: TokenCodec) -> None:
    class Upside:
        def score(self, trajectory: Trajectory) -> float:
            return -5.0 if trajectory.answer == "Paris" else 0.25

    (group,) = scripted(word_codec, reward=Upside()).train([PARIS]).groups or ()
    assert [t.reward for t in group.trajectories] == [-5.0, 0.25, 0.25, 0.25]
    assert [t.label for t in group.trajectories] == [Label.CORRECT] + [Label.INCORRECT] * 3


def test_every_rollout_has_a_seed_of_its_own(word_codec: TokenCodec) -> None:
    def seeds(
        step: int = 0, seed: int = 0, ids: Sequence[InstanceId] = ((0, 0), (0, 1)), phase: str = "train"
    ) -> list[int]:
        run = scripted(word_codec, seed=seed)
        run.trainer.global_step = step
        getattr(run, phase)([PARIS, ROME], ids)
        return [request.seed for request in run.callback.engine.requests]  # type: ignore[attr-defined]

    everything = [*seeds(), *seeds(step=1), *seeds(seed=1), *seeds(ids=((1, 0), (1, 1)))]
    assert len(set(everything)) == 4 * 8
    assert seeds() == seeds() and seeds(ids=((0, 1), (0, 0))) == seeds()[4:] + seeds()[:4]
    assert seeds(phase="evaluate", step=9) == seeds(phase="evaluate")  # the same in every evaluation
    assert not set(seeds(phase="evaluate")) & set(everything)


def test_limits_and_sampling_reach_the_rollouts(word_codec: TokenCodec) -> None:
    run = scripted(word_codec, lambda request: search_then("a") * 4, temperature=0.7, top_p=0.9, max_searches=0)
    assert {t.stop_reason for t in trajectories(run.train([PARIS]))} == {StopReason.MAX_SEARCHES}
    assert {r.sampling for r in run.callback.engine.requests} == {Sampling(0.7, 0.9)}  # type: ignore[attr-defined]


# Evaluation


def test_evaluation_is_greedy_with_samples_on_request(word_codec: TokenCodec) -> None:
    run = scripted(word_codec, eval_samples=2)
    batch = run.evaluate([PARIS, ROME])
    requests: list[RolloutRequest] = run.callback.engine.requests  # type: ignore[attr-defined]
    assert [r.sampling.temperature for r in requests] == [0.0] * 2 + [1.0] * 4
    assert [len(group.trajectories) for group in batch.groups or ()] == [1, 1]
    assert [len(group.trajectories) for group in batch.sampled_groups or ()] == [2, 2]
    assert [t.question for t in trajectories(batch, "sampled_groups")] == [PARIS, PARIS, ROME, ROME]
    assert [t.reward for t in trajectories(batch)] == [1.0, 0.0]
    assert scripted(word_codec).evaluate([PARIS]).sampled_groups is None


def test_the_same_evaluation_twice_drops_no_row_and_repeats_every_token(word_codec: TokenCodec) -> None:
    questions = [replace(PARIS, id=str(i), text=text) for i, text in enumerate(("who", "where is", "Rome ?", "a b"))]
    ids = [(0, i) for i in range(4)]
    policy = TalkativePolicy(word_codec, seed=1)
    run = Run(RolloutGrouping(eval_samples=3, seed=5, **SMALL), Module(word_codec, policy), stage="validate")
    once, twice = run.evaluate(questions, ids), run.evaluate(questions, ids)
    assert trajectories(once) == trajectories(twice)
    assert trajectories(once, "sampled_groups") == trajectories(twice, "sampled_groups")
    assert [t.question for t in trajectories(once)] == questions
    halves = [run.evaluate(questions[i : i + 2], ids[i : i + 2]) for i in (0, 2)]
    assert [t.token_ids for half in halves for t in trajectories(half)] == [t.token_ids for t in trajectories(once)]
    drawn = [t.token_ids for half in halves for t in trajectories(half, "sampled_groups")]
    assert drawn == [t.token_ids for t in trajectories(once, "sampled_groups")] and len(set(drawn)) == 12


@pytest.mark.parametrize("training", [True, False])
def test_the_window_is_eval_mode_without_gradients_and_back(
    word_codec: TokenCodec, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Also where the engine breaks; the progress line is wiped then, too."""
    seen, wiped = [], []
    monkeypatch.setattr(RolloutProgress, "close", lambda self: wiped.append(self))

    class Watching(ScriptedEngine):
        def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
            seen.append((self.policy.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            if len(seen) == 2:
                raise KeyError("an engine that breaks")
            return super().run(requests)

    run = scripted(word_codec, engine=Watching(word_codec, lambda request: SCRIPTS[0]))
    run.module.policy.train(training)
    run.train([PARIS])
    with pytest.raises(KeyError):
        run.train([PARIS])
    assert seen == [(False, False, False)] * 2 and len(wiped) == 2
    assert run.module.policy.training is training and torch.is_grad_enabled()


# Failures


def poison(query: str) -> Callable[[Sequence[str]], None]:
    def fail(queries: Sequence[str]) -> None:
        if query in queries:
            raise ConnectionError("the index is gone")

    return fail


def test_a_failed_search_is_counted_and_not_judged(word_codec: TokenCodec) -> None:
    turns = [search_then("Paris"), ["<search> Italy </search>"], ["<answer> Rome </answer>"], search_then("Paris")]
    run = scripted(
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
    run = scripted(
        word_codec, lambda request: search_then("Paris"), ToyRetriever(fail=poison("capital")), max_error_fraction=1
    )
    (group,) = run.train([PARIS]).groups or ()
    assert [(t.label, t.advantage) for t in group.trajectories] == [(None, 0.0)] * 4
    assert not group.has_signal and not group.is_mixed


def test_too_many_failures_stop_the_run(word_codec: TokenCodec) -> None:
    run = scripted(word_codec, lambda request: search_then("Paris"), ToyRetriever(fail=poison("capital")))
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
    run = scripted(word_codec, lambda request: search_then("a"), ToyRetriever(fail=poison("capital")), group_size=2)
    run.callback.max_error_fraction = allowed
    run.module.sum_over_ranks = lambda values: values + (torch.tensor([0, 6]) if values.dim() else 0)  # type: ignore[method-assign]
    if stops:
        with pytest.raises(RolloutError, match="2 of 8 rollouts"):
            run.train([PARIS])
    else:
        run.train([PARIS])


# What is logged


def test_a_step_tells_how_it_went(word_codec: TokenCodec) -> None:
    run = scripted(word_codec)
    batch = run.train([PARIS, ROME])
    logged = run.module.logged
    assert logged["rollout/exact_match"] == logged["rollout/reward"] == 0.25
    assert logged["rollout/searches_per_question"] == 0.5 and logged["rollout/answered_rate"] == 0.75
    assert logged["rollout/signal_groups"] == logged["rollout/mixed_groups"] == 1.0
    assert logged["rollout/all_correct_groups"] == logged["rollout/all_incorrect_groups"] == 0.0
    assert logged["rollout/tokens"] == sum(len(t.token_ids) for t in trajectories(batch)) / 8
    assert logged["rollout/policy_tokens"] == sum(sum(t.policy_mask) for t in trajectories(batch)) / 8
    assert (logged["search/queries"], logged["search/errors"]) == (4, 0)
    run.module.logged = {}
    run.evaluate([PARIS])
    assert run.module.logged == {}  # the module logs evaluations


# What a user can get wrong


def test_a_group_of_one_is_warned_of(word_codec: TokenCodec) -> None:
    with pytest.warns(UserWarning, match=r"rollout.group_size is 1: .* Use 2 or more\."):
        run = scripted(word_codec, group_size=1)
    assert [t.advantage for t in trajectories(run.train([PARIS]))] == [0.0]
    Run(RolloutGrouping(group_size=1), Module(word_codec), stage="validate")  # there it is no mistake


def test_a_prompt_beyond_the_budget_is_warned_of_once(word_codec: TokenCodec) -> None:
    run = scripted(word_codec, max_tokens=4, group_size=2)
    with pytest.warns(UserWarning) as caught:
        batch = run.train([PARIS, Question("long", "who where is ?", ("a",))])
        run.train([PARIS])
    assert [str(warning.message) for warning in caught] == [
        f"Question {identity}: its prompt has 5 tokens, rollout.max_tokens allows 4 for a whole rollout. "
        "Its rollouts end as MAX_TOKENS without a token."
        for identity in ("1", "long")
    ]
    assert {(t.stop_reason, any(t.policy_mask)) for t in trajectories(batch)} == {(StopReason.MAX_TOKENS, False)}


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


@pytest.mark.parametrize("datamodule", [None, SimpleNamespace(), SimpleNamespace(retriever=None)])
def test_without_a_retriever_there_is_nothing_to_search(word_codec: TokenCodec, datamodule: object) -> None:
    trainer: Any = SimpleNamespace(datamodule=datamodule)
    with pytest.raises(ConfigError, match=r"data.retriever is empty: rollouts need something to search\. Set it, or"):
        RolloutGrouping().setup(trainer, Module(word_codec), "fit")  # type: ignore[arg-type]


def test_a_retriever_that_breaks_the_contract_is_refused_at_start(word_codec: TokenCodec) -> None:
    with pytest.raises(ConfigError, match=r"Broken.search\(queries, k=2\) was tried with 2 queries"):
        Run(RolloutGrouping(top_k=2), Module(word_codec), type("Broken", (), {"search": lambda *_: None})())


def test_the_worker_stops_with_the_run(word_codec: TokenCodec) -> None:
    run = scripted(word_codec)
    pool = run.callback._searches
    run.callback.setup(run.trainer, run.module, "validate")  # type: ignore[arg-type]
    assert run.callback._searches is pool is not None  # `fit` validates with the same worker
    run.callback.teardown(run.trainer, run.module, "fit")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(["late"])
    assert isinstance(run.callback.engine, Engine)
