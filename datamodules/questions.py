"""One question's way from a file to a training step.

`sources.py` finds the files, `readers.py` makes a Question of each row, `mixture.py` says how often an epoch reads it,
and `loaders.py` deals it to a process, in a seeded order that a resumed run continues exactly. Each question of a step
carries its instance_id, (epoch, position), which no other has.

Next: callbacks/rollout_grouping.py, which turns each StepBatch into rollouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from sdsearch_lightning.datamodules.demonstrations import TAGS, read_demonstrations
from sdsearch_lightning.datamodules.loaders import DemonstrationBatch, EvaluationBatches, Share, TrainingBatches
from sdsearch_lightning.datamodules.mixture import Mixture, draw_per_source, fingerprint, hold_out, overlap
from sdsearch_lightning.datamodules.readers import check_columns, read_questions
from sdsearch_lightning.datamodules.sources import BENCHMARKS, Files, check_weights, find_files
from sdsearch_lightning.errors import ConfigError, DataError
from sdsearch_lightning.retrieval import Retriever
from sdsearch_lightning.retrieval.text import is_whole
from sdsearch_lightning.scoring.normalization import normalize_answer
from sdsearch_lightning.types import Demonstration, Question, StepBatch


class SearchDataModule(pl.LightningDataModule):
    """Serves questions from files, and the retriever that answers searches about them.

    A subclass with another origin overrides `questions`, `demonstrations` and, for a from-scratch model, `vocabulary`.

    Args:
        train_files: one entry, a list, or a mapping of entries to weights, which say how often an epoch reads a row.
            An entry is a .jsonl, .jsonl.gz or .parquet file, a folder, a benchmark (nq, ...) or a data set of the hub.
            null: none.
        val_files: one entry or a list, for validation; null: none.
        test_files: one entry or a list, for `test` and `predict`; null: none.
        demonstration_files: one file or a list, of {question, answers, turns, siblings}, for `supervise`; null: none.
        demonstration_top_k: passages of a search whose observation such a file leaves out; set it as the rollouts' own.
        columns: names of {question, answers, id, source} in your files, where they differ; a dot leads into a column.
            support: the column of supporting passages, read where it is named, of benchmarks too. null: they do not
            differ.
        hub: where benchmarks come from: a data set of the Hugging Face hub, or a folder of that layout.
        holdout: where there are no val_files, validate on this many training questions, and train without them; 0:
            none.
        retriever: what rollouts search with: any object with `search(queries, k)`; null for a world, which
            brings its own.
        batch_size: questions (or demonstrations) per process and training step.
        eval_batch_size: questions per process and evaluation batch.
        seed: decides the order of every epoch, and what is held out.
        limit: read at most this many rows of each file, the first ones; null: all.
        limit_per_source: evaluate at most this many questions of each source, drawn at random; the same ones whatever
            the seed, so that runs compare. null: all.
        normalization: rule by which rewards, scores and evidence compare answers: english as Search-R1 does; unicode
            does the same for other scripts, and gives the same on ASCII text.
    """

    shuffle_demonstrations = True
    """False in a subclass whose demonstrations are a curriculum: they are then read in their own order."""

    def __init__(
        self,
        train_files: Files = None,
        val_files: str | list[str] | None = None,
        test_files: str | list[str] | None = None,
        demonstration_files: str | list[str] | None = None,
        demonstration_top_k: int = 3,
        columns: dict[str, str] | None = None,
        hub: str = "RUC-NLPIR/FlashRAG_datasets",
        holdout: int = 0,
        retriever: Retriever | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 256,
        seed: int = 0,
        limit: int | None = None,
        limit_per_source: int | None = None,
        normalization: Literal["english", "unicode"] = "english",
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        sizes["demonstration_top_k"] = demonstration_top_k
        for name, value in (sizes | {"limit": limit, "limit_per_source": limit_per_source}).items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: expected at least 1, found {value}.")
        if holdout < 0 or (holdout and val_files):
            found = f"{holdout} beside data.val_files {val_files}" if val_files else holdout
            raise ConfigError(f"data.holdout: expected 0, or a number of questions without val_files, found {found}.")
        normalize_answer("", normalization)  # raises where there is no such rule
        check_weights(train_files, "train")
        self.files: dict[str, Files] = {"train": train_files, "val": val_files, "test": test_files}
        self.columns, self.hub, self.holdout = check_columns(columns), hub, holdout
        self.demonstration_files, self.demonstration_top_k = demonstration_files, demonstration_top_k
        self.retriever = retriever
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.limit, self.limit_per_source = limit, limit_per_source
        self.normalization = normalization
        self._read: dict[str, Sequence[Any]] = {}

    @property
    def retriever(self) -> Retriever | None:
        """What rollouts search with."""
        return self._retriever

    @retriever.setter
    def retriever(self, found: Retriever | None) -> None:
        self._retriever = None if found is None else Retriever.adopt(found)

    def questions(self, split: str) -> Sequence[Question]:
        """The questions of "train", "val", "test" or "predict", in a fixed order; empty where there are none.

        Those of "predict" are of the test files, and need no gold answers.
        """
        need_answers, split = split != "predict", {"predict": "test"}.get(split, split)
        files = find_files(self.files[split], split, self.hub)
        support = {name: column for name, column in self.columns.items() if name == "support"}
        parts = [
            read_questions(
                file.path, self.limit, support if file.is_benchmark else self.columns, file.source, need_answers
            )
            for file in files
        ]
        rows = [replace(question, normalization=self.normalization) for part in parts for question in part]
        return Mixture(rows, [len(part) for part in parts], [file.weight for file in files])

    def demonstrations(self) -> Sequence[Demonstration]:
        """What the cold start imitates, in a fixed order; empty where there is none."""
        files = [self.demonstration_files] if isinstance(self.demonstration_files, str) else self.demonstration_files
        protocol = getattr(self.trainer and self.trainer.lightning_module, "protocol", None)
        options = self.limit, self.retriever, self.demonstration_top_k, getattr(protocol, "tags", TAGS)
        return [row for path in files or () for row in read_demonstrations(path, *options)]

    def vocabulary(self) -> tuple[str, ...] | None:
        """Words of a word-level tokenizer for a from-scratch model; None for text that needs an ordinary one."""
        return None

    def data_set_of(self, source: str) -> dict[str, str] | None:
        """Where the test questions of a source lie on the hub, for a model card; None where they are somebody's own."""
        if source not in BENCHMARKS or Path(self.hub).expanduser().is_dir():
            return None
        entries = self.files["test"] or ()
        is_listed = source in ([entries] if isinstance(entries, str) else entries)
        return {"name": self.hub, "config": source, "split": BENCHMARKS[source]} if is_listed else None

    def best_query(self, question: Question) -> str | None:
        """The best first query for a question, for `TeacherDiagnostics`; None where nobody knows it."""
        return None

    def prepare_data(self) -> None:
        """Builds the index, on one process per node."""
        if self.retriever is not None:
            self.retriever.prepare()

    def setup(self, stage: str) -> None:
        """Reads what the stage needs: a fault in a file shows before a model is loaded.

        Raises:
            ConfigError: the stage has no files.
            DataError: a file or row that cannot be used.
        """
        split = self._training_split if stage == "fit" else {"validate": "val"}.get(stage, stage)
        if not self._rows(split):
            option = {"demonstrations": "demonstration", "predict": "test"}.get(split, split) + "_files"
            raise ConfigError(f"data.{option}: expected at least one file for this command, found none.")
        if split != "demonstrations":
            self._check_texts(split)
            self._warn_of_vanishing_golds(split)
        if stage == "fit" and self._rows("val") and self.files["val"] and split == "train":
            self._warn_of_overlap()

    def teardown(self, stage: str) -> None:
        """Lets the retriever give back what it holds."""
        if self.retriever is not None:
            self.retriever.close()

    def train_dataloader(self) -> TrainingBatches[Any, Any]:
        """StepBatch by StepBatch; or, for a module that learns from demonstrations, batches of those."""
        rows, share = self._rows(self._training_split), self._share(self.batch_size)
        if self._training_split == "train":
            return TrainingBatches(rows, StepBatch, share, self.seed, fingerprint(rows))
        return TrainingBatches(rows, DemonstrationBatch, share, self.seed if self.shuffle_demonstrations else None)

    @property
    def training_questions(self) -> Mixture[Question]:
        """All of them, in the order of the files; for callbacks that draw more than the loader hands out."""
        return Mixture.of(self._rows("train"))

    def val_dataloader(self) -> EvaluationBatches | list[Any]:
        """All validation questions; an empty list, which Lightning passes over, where there are none."""
        return self._evaluation("val") if self._rows("val") else []

    def test_dataloader(self) -> EvaluationBatches:
        return self._evaluation("test")

    def predict_dataloader(self) -> EvaluationBatches:
        return self._evaluation("predict")

    def _evaluation(self, split: str) -> EvaluationBatches:
        return EvaluationBatches(self._rows(split), self._share(self.eval_batch_size))

    def _share(self, batch_size: int) -> Share:
        if self.trainer is None:
            return Share(batch_size)
        return Share(batch_size, self.trainer.global_rank, self.trainer.world_size)

    @property
    def _training_split(self) -> str:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return "demonstrations" if getattr(module, "learns_from", None) == "demonstrations" else "train"

    def _rows(self, split: str) -> Sequence[Any]:
        if split in self._read:
            return self._read[split]
        if self.holdout and split in ("train", "val"):
            self._read["train"], self._read["val"] = hold_out(self.questions("train"), self.holdout, self.seed)
        else:
            self._read[split] = self.demonstrations() if split == "demonstrations" else self.questions(split)
        if self.limit_per_source is not None and split in ("val", "test", "predict"):
            self._read[split] = draw_per_source(self._read[split], self.limit_per_source)
        return self._read[split]

    def _check_texts(self, split: str) -> None:
        for question in self._rows(split):  # files were checked row by row; a user's own questions come here first
            if not is_whole((question.id, question.text, question.answers, question.source, question.support)):
                raise DataError(f"{split} question {question.id!a}: expected text, found half a character in it.")

    def _warn_of_vanishing_golds(self, split: str) -> None:
        lost = [
            question
            for question in self._rows(split)
            if question.answers and not any(normalize_answer(gold, question.normalization) for gold in question.answers)
        ]
        if lost:
            rank_zero_warn(
                f"{len(lost)} of {len(self._rows(split))} {split} questions have gold answers of which normalising "
                f"leaves nothing, such as {lost[0].answers[0]!r} of question {lost[0].id!r}: only an answer that "
                "vanishes too scores there. Leave them out, or reward them with a class of your own."
            )

    def _warn_of_overlap(self) -> None:
        if shared := overlap(self._rows("train"), self._rows("val")):
            rank_zero_warn(
                f"{len(shared)} of {len(self._rows('val'))} validation questions are training questions too, such as "
                f"{shared[0].text!r}: val/ metrics will flatter. data.holdout makes a validation set without overlap."
            )
