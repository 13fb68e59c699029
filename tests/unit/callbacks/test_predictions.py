"""`predict`: questions with and without gold answers, and a line for each in their order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.grouping_runs import PARIS, ROME, grouping_run
from sdsearch_lightning.callbacks.predictions import PredictionLog
from sdsearch_lightning.errors import StorageError
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import StepBatch

LONE = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
OPEN = replace(ROME, id="open", answers=())


def predict(codec: TokenCodec, *questions: Any) -> StepBatch:
    run = grouping_run(codec)
    batch = StepBatch(questions)
    run.callback.on_predict_batch_start(run.trainer, run.module, batch, 0)
    return batch


def test_a_question_without_golds_is_answered_and_not_scored(word_codec: TokenCodec) -> None:
    known, unknown = predict(word_codec, PARIS, OPEN).groups or ()
    (right,), (unscored,) = known.trajectories, unknown.trajectories
    assert right.reward is not None and right.label is not None
    assert (unscored.reward, unscored.label, unscored.advantage) == (None, None, None)
    assert unscored.answer is not None and unscored.queries
    only = predict(word_codec, OPEN).groups or ()
    assert only[0].trajectories[0].reward is None, "the probe of reward and label wants gold answers too"


def trainer_of(folder: Path) -> Any:
    return SimpleNamespace(default_root_dir=str(folder), is_global_zero=True, strategy=LONE)


def test_lines_are_in_the_order_of_the_questions(word_codec: TokenCodec, tmp_path: Path) -> None:
    batch, log = predict(word_codec, PARIS, OPEN), PredictionLog()
    trainer = trainer_of(tmp_path)
    for part in (batch.groups or ())[::-1]:
        one = StepBatch([part.question], [part.instance_id])
        one.groups = (part,)
        log.on_predict_batch_end(trainer, None, None, one, 0)  # type: ignore[arg-type]
    log.on_predict_end(trainer, None)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [PARIS.id, "open"]
    assert set(lines[0]) == {"id", "source", "question", "answer", "queries", "passages", "stop_reason"}
    assert lines[0]["stop_reason"] == "ANSWERED" and lines[0]["passages"][0][0] == '"Paris"'


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"predictions.jsonl could not be written"):
        PredictionLog().on_predict_end(trainer_of(tmp_path / "file"), None)  # type: ignore[arg-type]
