"""From a batch of questions to scored groups: seeds, scores, evaluation, and what is logged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from helpers.grouping_runs import (
    FOUR_OUTCOMES,
    PARIS,
    ROME,
    GroupingModule,
    GroupingRun,
    grouping_run,
    rollouts_in,
    search_then,
)
from helpers.models import TalkativePolicy
from helpers.passages import PROTOCOL
from helpers.players import ScriptedEngine, Turns
from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.scoring.advantages import group_relative
from sdsearch_lightning.types import (
    InstanceId,
    Label,
    Question,
    RolloutRequest,
    Sampling,
    StopReason,
    Trajectory,
)

SMALL: dict[str, Any] = {"max_searches": 2, "max_turn_tokens": 12, "max_observation_tokens": 20, "max_tokens": 90}


# Groups


def test_rollouts_are_scored_and_grouped(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec)
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
        return FOUR_OUTCOMES[(request.rollout_index + 2 * request.instance_id[1]) % 3]

    together = grouping_run(word_codec, script, advantage_scale=scale).train(pair, [(0, 0), (0, 1)])
    apart = [
        grouping_run(word_codec, script, advantage_scale=scale).train([question], [(0, i)])
        for i, question in enumerate(pair)
    ]
    assert rollouts_in(together) == [t for batch in apart for t in rollouts_in(batch)]
    assert [len(group.trajectories) for group in together.groups or ()] == [4, 4]
    assert len({t.reward for t in rollouts_in(together)}) == 2


def test_the_label_is_independent_of_the_reward(word_codec: TokenCodec) -> None:
    class Upside:
        def score(self, trajectory: Trajectory) -> float:
            return -5.0 if trajectory.answer == "Paris" else 0.25

    (group,) = grouping_run(word_codec, reward=Upside()).train([PARIS]).groups or ()
    assert [t.reward for t in group.trajectories] == [-5.0, 0.25, 0.25, 0.25]
    assert [t.label for t in group.trajectories] == [Label.CORRECT] + [Label.INCORRECT] * 3


def test_every_rollout_has_a_seed_of_its_own(word_codec: TokenCodec) -> None:
    def seeds(
        step: int = 0, seed: int = 0, ids: Sequence[InstanceId] = ((0, 0), (0, 1)), phase: str = "train"
    ) -> list[int]:
        run = grouping_run(word_codec, seed=seed)
        run.trainer.global_step = step
        getattr(run, phase)([PARIS, ROME], ids)
        return [request.seed for request in run.callback.engine.requests]  # type: ignore[attr-defined]

    everything = [*seeds(), *seeds(step=1), *seeds(seed=1), *seeds(ids=((1, 0), (1, 1)))]
    assert len(set(everything)) == 4 * 8
    assert seeds() == seeds() and seeds(ids=((0, 1), (0, 0))) == seeds()[4:] + seeds()[:4]
    assert seeds(phase="evaluate", step=9) == seeds(phase="evaluate")  # the same in every evaluation
    assert not set(seeds(phase="evaluate")) & set(everything)


def test_limits_and_sampling_reach_the_rollouts(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec, lambda request: search_then("a") * 4, temperature=0.7, top_p=0.9, max_searches=0)
    assert {t.stop_reason for t in rollouts_in(run.train([PARIS]))} == {StopReason.MAX_SEARCHES}
    assert {r.sampling for r in run.callback.engine.requests} == {Sampling(0.7, 0.9)}  # type: ignore[attr-defined]


# Evaluation


def test_evaluation_is_greedy_with_samples_on_request(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec, eval_samples=2)
    batch = run.evaluate([PARIS, ROME])
    requests: list[RolloutRequest] = run.callback.engine.requests  # type: ignore[attr-defined]
    assert [r.sampling.temperature for r in requests] == [0.0] * 2 + [1.0] * 4
    assert [len(group.trajectories) for group in batch.groups or ()] == [1, 1]
    assert [len(group.trajectories) for group in batch.sampled_groups or ()] == [2, 2]
    assert [t.question for t in rollouts_in(batch, "sampled_groups")] == [PARIS, PARIS, ROME, ROME]
    assert [t.reward for t in rollouts_in(batch)] == [1.0, 0.0]
    assert grouping_run(word_codec).evaluate([PARIS]).sampled_groups is None


def test_the_same_evaluation_twice_drops_no_row_and_repeats_every_token(word_codec: TokenCodec) -> None:
    questions = [replace(PARIS, id=str(i), text=text) for i, text in enumerate(("who", "where is", "Rome ?", "a b"))]
    ids = [(0, i) for i in range(4)]
    policy = TalkativePolicy(word_codec, seed=1)
    run = GroupingRun(
        RolloutGrouping(eval_samples=3, seed=5, **SMALL), GroupingModule(word_codec, policy), stage="validate"
    )
    once, twice = run.evaluate(questions, ids), run.evaluate(questions, ids)
    assert rollouts_in(once) == rollouts_in(twice)
    assert rollouts_in(once, "sampled_groups") == rollouts_in(twice, "sampled_groups")
    assert [t.question for t in rollouts_in(once)] == questions
    halves = [run.evaluate(questions[i : i + 2], ids[i : i + 2]) for i in (0, 2)]
    assert [t.token_ids for half in halves for t in rollouts_in(half)] == [t.token_ids for t in rollouts_in(once)]
    drawn = [t.token_ids for half in halves for t in rollouts_in(half, "sampled_groups")]
    assert drawn == [t.token_ids for t in rollouts_in(once, "sampled_groups")] and len(set(drawn)) == 12


@pytest.mark.parametrize("training", [True, False])
def test_the_window_is_eval_mode_without_gradients_and_back(word_codec: TokenCodec, training: bool) -> None:
    """Also where the engine breaks."""
    seen = []

    class Watching(ScriptedEngine):
        def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
            seen.append((self.policy.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            if len(seen) == 2:
                raise KeyError("an engine that breaks")
            return super().run(requests)

    run = grouping_run(word_codec, engine=Watching(lambda request: FOUR_OUTCOMES[0]))
    run.module.policy.train(training)
    run.train([PARIS])
    with pytest.raises(KeyError):
        run.train([PARIS])
    assert seen == [(False, False, False)] * 2
    assert run.module.policy.training is training and torch.is_grad_enabled()


# What is logged


def test_a_step_tells_how_it_went(word_codec: TokenCodec) -> None:
    run = grouping_run(word_codec)
    batch = run.train([PARIS, ROME])
    logged = run.module.logged
    assert logged["rollout/exact_match"] == logged["rollout/reward"] == 0.25
    assert logged["rollout/searches_per_question"] == 0.5 and logged["rollout/answered_rate"] == 0.75
    assert logged["rollout/signal_groups"] == logged["rollout/mixed_groups"] == 1.0
    assert logged["rollout/all_correct_groups"] == logged["rollout/all_incorrect_groups"] == 0.0
    assert logged["rollout/tokens"] == sum(len(t.token_ids) for t in rollouts_in(batch)) / 8
    assert logged["rollout/policy_tokens"] == sum(sum(t.policy_mask) for t in rollouts_in(batch)) / 8
    assert (logged["search/queries"], logged["search/errors"]) == (4, 0)
    run.module.logged = {}
    run.evaluate([PARIS])
    assert run.module.logged == {}  # the module logs evaluations


# What is told at the start


FIRST_PROMPT = """the first prompt, as the model reads it (6 tokens):
question: where is Paris ?
a turn ends with a closing tag, or with <eos> (2)
"""


def test_the_first_prompt_is_shown_once(word_codec: TokenCodec, capsys: pytest.CaptureFixture[str]) -> None:
    run = grouping_run(word_codec)
    run.train([PARIS, ROME])
    shown = capsys.readouterr()
    tokens = len(rollouts_in(run.train([PARIS]))[0].spans[0].token_ids)
    assert shown.out == FIRST_PROMPT.replace("6", str(tokens)).replace(
        "question: where is Paris ?", word_codec.decode(word_codec.encode("question: where is Paris ?"))
    )
    run.evaluate([ROME])
    after = capsys.readouterr()
    assert (after.out, shown.err, after.err) == ("", "", "")


def test_evaluation_shows_it_too(word_codec: TokenCodec, capsys: pytest.CaptureFixture[str]) -> None:
    run = grouping_run(word_codec)
    run.evaluate([PARIS])
    run.train([PARIS])
    assert capsys.readouterr().out.count("the first prompt") == 1


def test_one_rank_speaks_for_all(
    word_codec: TokenCodec, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    grouping_run(word_codec).train([PARIS])
    assert capsys.readouterr().out == ""


def test_what_ends_a_turn_is_said_where_nothing_does(
    word_codec: TokenCodec, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = TokenCodec(word_codec.tokenizer, PROTOCOL.tags, eos_ids=())
    run = grouping_run(codec, lambda request: ["<answer> Paris </answer>"])
    run.callback._tell_beginning(
        run.callback.sampler(run.trainer, run.module),  # type: ignore[arg-type]
        run.callback.sampler(run.trainer, run.module).requests([PARIS], [(0, 0)], 1)[0],  # type: ignore[arg-type]
    )
    assert "or with its budget only" in capsys.readouterr().out
