"""A short, silent, real fit: questions in memory, an engine that plays written rollouts, and a record of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from training_data import PASSAGES, QUESTION, SCRIPTS, WORDS, demonstration, play

from sdsearch_lightning.datamodules import SearchDataModule
from sdsearch_lightning.policy.packing import PackedSequences
from sdsearch_lightning.rollout import Engine
from sdsearch_lightning.types import Demonstration, Label, Passage, Question, RolloutRequest, SiblingRecord, Trajectory


class Lookup:
    """A retriever that always finds the same."""

    def search(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        return [list(PASSAGES[:k]) for _ in queries]


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
        return [replace(QUESTION, id=f"q{i}", text=f"{QUESTION.text} {WORDS[i]}") for i in range(12)]

    def demonstrations(self) -> list[Demonstration]:
        sibling = SiblingRecord(0, ("capital of Norway",), Label.INCORRECT)
        return [replace(demonstration((sibling,) * (i % 3)), question=q) for i, q in enumerate(self.questions("train"))]

    def vocabulary(self) -> tuple[str, ...]:
        return tuple(WORDS)


class ScriptedEngine(Engine):
    """Plays one of the scripts, drawn from the request's seed; log-probs are the policy's own."""

    def __init__(self, *scripts: str) -> None:
        self.scripts = scripts or SCRIPTS

    def run(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        return [self._run(request) for request in requests]

    def _run(self, request: RolloutRequest) -> Trajectory:
        script = random.Random(request.seed).choice(self.scripts)
        result = self.searches.submit(["x"]).result()[0]
        draft = play(self.start(request), script, result)
        sampled = torch.tensor(draft.policy_mask).nonzero()[:, 0]
        logits = self.policy.logits(PackedSequences.pack([draft.token_ids]), sampled)
        tokens = torch.tensor(draft.token_ids)[sampled]
        temperature = request.sampling.temperature or 1.0
        logprobs = (logits / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return play(self.start(request), script, result, logprobs.tolist())


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
