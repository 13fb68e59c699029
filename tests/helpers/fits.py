"""A short, silent, real fit: questions in memory, an engine that plays written rollouts, and a record of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from helpers.players import ScriptedEngine
from helpers.training_rollouts import (
    SCRIPTS,
    TRAINING_PASSAGES,
    TRAINING_QUESTION,
    TRAINING_WORDS,
    demonstration,
)
from sdsearch_lightning.callbacks import HindsightConstruction, JSDWeightScheduler, RolloutGrouping
from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.scoring.rewards import ExactMatchReward
from sdsearch_lightning.types import Demonstration, Label, Passage, Question, SiblingRecord


class Lookup:
    """A retriever that always finds the same."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [list(TRAINING_PASSAGES[:k]) for _ in queries]


class Broken(Lookup):
    """One that answers the probe at the start, and then nothing."""

    calls = 0

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("no such host")
        return super().search(queries, k)


class ToyData(SearchDataModule):
    """Twelve questions, and as many demonstrations."""

    def __init__(self, batch_size: int = 3, retriever: Any = None) -> None:
        super().__init__(retriever=retriever or Lookup(), batch_size=batch_size)

    def questions(self, split: str) -> list[Question]:
        return [
            replace(TRAINING_QUESTION, id=f"q{i}", text=f"{TRAINING_QUESTION.text} {TRAINING_WORDS[i]}")
            for i in range(12)
        ]

    def demonstrations(self) -> list[Demonstration]:
        sibling = SiblingRecord(0, ("capital of Norway",), Label.INCORRECT)
        return [replace(demonstration((sibling,) * (i % 3)), question=q) for i, q in enumerate(self.questions("train"))]

    def vocabulary(self) -> tuple[str, ...]:
        return tuple(TRAINING_WORDS)


class DrawnScripts(ScriptedEngine):
    """Plays one of the texts, drawn from the request's seed; log-probs are the policy's own."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts or SCRIPTS
        super().__init__(lambda request: random.Random(request.seed).choice(self.texts), logprobs=None)


class Record(pl.Callback):
    """Keeps batches, and what each step logged."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module: Any, *callbacks: pl.Callback, data: Any = None, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """A real, silent fit on the CPU."""
    options = {"max_steps": 1, "enable_checkpointing": False, "limit_val_batches": 0} | options
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=data or ToyData(), ckpt_path=ckpt_path)
    return trainer


# The method, on short scripts


def grouping(engine: Engine | None = None, **options: Any) -> RolloutGrouping:
    options = {"group_size": 4, "max_tokens": 160, "top_k": 2, "reward": ExactMatchReward()} | options
    return RolloutGrouping(engine=engine or DrawnScripts(), **options)


def taught(weight: float = 0.5, warmup_steps: int = 0, rule: Any = "all") -> list[Any]:
    return [grouping(), HindsightConstruction(rule), JSDWeightScheduler(weight, warmup_steps)]


def without_clocks(metrics: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in m.items() if "seconds" not in k and "per_second" not in k} for m in metrics]
