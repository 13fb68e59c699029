"""Evaluation through a real Trainer: every rollout counts once, under the right name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.fits import DrawnScripts, ToyData
from helpers.training import make_module
from helpers.training_rollouts import DIRECT, ONE, TWO, rollout
from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.training import evaluation_steps
from sdsearch_lightning.training.evaluation_steps import ScoreBoard
from sdsearch_lightning.types import Question, RolloutGroup, StepBatch, Trajectory


class TwoSources(ToyData):
    """The first seven questions are of one source, the other five of another."""

    def questions(self, split: str) -> list[Question]:
        return [replace(q, source="nq" if i < 7 else "hotpotqa") for i, q in enumerate(super().questions(split))]


def evaluate(command: str, module: SDSearchModule | None = None, batch_size: int = 5, **options: Any) -> Any:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RolloutGrouping(engine=DrawnScripts(), top_k=2, max_tokens=160, **options)],
    )
    data = TwoSources()
    data.eval_batch_size = batch_size
    arguments = {"verbose": False} if command != "predict" else {}
    return getattr(trainer, command)(module or make_module(), datamodule=data, **arguments)


def predicted() -> list[Trajectory]:
    return [t for batch in evaluate("predict") for group in batch.groups for t in group.trajectories]


def test_predict_gives_every_question_once_and_in_order() -> None:
    rollouts = predicted()
    assert [t.question.id for t in rollouts] == [f"q{i}" for i in range(12)]
    assert [t.instance_id for t in rollouts] == [(0, i) for i in range(12)]


def test_validation_counts_what_predict_gives() -> None:
    rollouts = predicted()
    (scores,) = evaluate("validate")
    scores.pop("step")
    assert scores["val/questions"] == 12
    assert scores["val/exact_match"] == pytest.approx(sum(t.answer == "Rome" for t in rollouts) / 12)
    assert scores["val/searches_per_question"] == pytest.approx(sum(len(t.queries) for t in rollouts) / 12)
    assert 0 < scores["val/exact_match"] < 1
    assert scores["val/valid_action_rate"] == scores["val/answered_rate"] == 1
    assert not any("sampled" in name for name in scores)


def test_neither_batches_nor_an_evaluation_before_change_a_score() -> None:
    module = make_module()
    first = evaluate("validate", module)
    assert evaluate("validate", module, batch_size=12) == first
    assert evaluate("validate", module, batch_size=1) == first


def test_sampled_rollouts_are_counted_apart() -> None:
    (scores,) = evaluate("validate", eval_samples=3)
    assert scores["val/questions"] == 12 and scores["val/sampled_questions"] == 36
    assert {name.removeprefix("val/sampled_") for name in scores if "sampled" in name} == {
        name.removeprefix("val/") for name in scores if "sampled" not in name and name != "step"
    }


def test_test_counts_by_source() -> None:
    rollouts = predicted()
    (scores,) = evaluate("test", eval_samples=1)
    for source, share in (("nq", rollouts[:7]), ("hotpotqa", rollouts[7:])):
        assert scores[f"test/{source}/questions"] == scores[f"test/{source}/sampled_questions"] == len(share)
        right = sum(t.answer == "Rome" for t in share) / len(share)
        assert scores[f"test/{source}/exact_match"] == pytest.approx(right)
    assert "test/questions" not in scores


@pytest.mark.parametrize("step", ["validation_step", "test_step", "predict_step"])
def test_rollouts_have_to_be_there(step: str) -> None:
    with pytest.raises(RuntimeError, match=r"asked for StepBatch.groups.*RolloutGrouping"):
        getattr(make_module(), step)(StepBatch([Question("q", "?", ("a",))]), 0)


# The board


def test_a_board_keeps_names_apart_and_forgets_when_told() -> None:
    board = ScoreBoard()
    board.update("a/", [rollout(ONE), rollout(DIRECT)])
    board.update("b/", [rollout(TWO)])
    board.update("a/", [rollout(ONE)])
    scores = board.compute()
    assert list(scores) == ["a/", "b/"]
    assert scores["a/"]["questions"] == 3 and scores["a/"]["exact_match"] == pytest.approx(2 / 3)
    assert scores["b/"]["questions"] == 1 and scores["b/"]["searches_per_question"] == 2
    board.reset()
    assert board.compute() == {}


def test_every_rank_computes_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather_object(everyone: list[Any], mine: set[str]) -> None:
        everyone[:] = [mine, {"test/nq/", "test/popqa/"}]

    ranks = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr(evaluation_steps, "dist", SimpleNamespace(**vars(ranks), all_gather_object=all_gather_object))
    board = ScoreBoard()
    board.update("test/hotpotqa/", [rollout(ONE)], torch.device("cpu"))
    scores = board.compute()
    assert list(scores) == ["test/hotpotqa/", "test/nq/", "test/popqa/"], "in the same order on every rank"
    assert [scores[name]["questions"] for name in scores] == [1, 0, 0]


def test_scores_name_the_step_they_belong_to() -> None:
    logged: dict[str, float] = {}
    module = make_module()
    module._trainer = SimpleNamespace(global_step=7, world_size=1)  # type: ignore[assignment]
    module.log_dict = logged.update  # type: ignore[method-assign,assignment]
    group: Sequence[RolloutGroup] = [RolloutGroup(rollout(ONE).question, (0, 0), (rollout(ONE),))]
    batch = StepBatch([group[0].question])
    batch.groups = tuple(group)
    module.on_validation_epoch_start()
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    assert logged["step"] == 7 and logged["val/exact_match"] == 1 and logged["val/questions"] == 1
