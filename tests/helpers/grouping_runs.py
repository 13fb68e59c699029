"""RolloutGrouping between a retriever and a module, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import Tensor, nn

from helpers.passages import PROTOCOL, ToyRetriever
from helpers.players import ScriptedEngine, Turns
from sdsearch_lightning.callbacks import RolloutGrouping
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.scoring.rewards import ExactMatchReward
from sdsearch_lightning.types import (
    InstanceId,
    Question,
    RolloutRequest,
    StepBatch,
    Trajectory,
)

PARIS = Question("1", "where is Paris ?", ("Paris",), "nq")
ROME = Question("1", "the city of Rome ?", ("Rome",), "hotpotqa")  # the same id, as Search-R1's index has it


class GroupingModule:
    """What the callback needs of a SDSearchModule, and what it logged."""

    def __init__(self, codec: TokenCodec, policy: nn.Module | None = None) -> None:
        self.codec, self.protocol, self.policy = codec, PROTOCOL, policy or nn.Linear(1, 1)
        self.logged: dict[str, float] = {}
        self.sampler = None

    def log_dict(self, metrics: dict[str, float], **options: object) -> None:
        self.logged |= metrics

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values


class GroupingRun:
    """A callback between a retriever and a module, set up as a Trainer would."""

    def __init__(
        self, callback: RolloutGrouping, module: GroupingModule, retriever: object = None, stage: str = "fit"
    ) -> None:
        self.callback, self.module = callback, module
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            world_size=1,
            is_global_zero=True,
            progress_bar_callback=None,
            testing=False,
            predicting=False,
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


FOUR_OUTCOMES = [search_then("Paris"), ["<answer> Rome </answer>"], search_then("Italy"), []]
"""By rollout: right for PARIS, right for ROME, wrong for both, no answer."""


def grouping_run(
    codec: TokenCodec,
    script: Callable[[RolloutRequest], Turns] = lambda request: FOUR_OUTCOMES[request.rollout_index],
    retriever: object = None,
    **options: Any,
) -> GroupingRun:
    engine = ScriptedEngine(script)
    options = {"group_size": 4, "engine": engine, "reward": ExactMatchReward(), "max_invalid_actions": 0} | options
    return GroupingRun(RolloutGrouping(**options), GroupingModule(codec), retriever)


def rollouts_in(batch: StepBatch, slot: str = "groups") -> list[Trajectory]:
    return [t for group in batch.require(slot, by="a test") for t in group.trajectories]
