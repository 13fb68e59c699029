"""A small run folder and its rollouts, for the tests of the report and of the trajectory log."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdsearch_lightning.report.trajectories import append_records, make_record
from sdsearch_lightning.types import (
    InstanceId,
    Label,
    Passage,
    Question,
    Span,
    SpanKind,
    StopReason,
    TokenCredit,
    Trajectory,
)

REPORT_WORDS = [
    "<pad>",
    *"<search> </search> <answer> </answer> where is ? Rome Oslo Italy capital of documents".split(),
]


class WordTokenizer:
    """Joins words with spaces, as a word-level tokenizer does."""

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(REPORT_WORDS.index(word) for word in text.split())

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return " ".join(REPORT_WORDS[token] for token in token_ids)


REPORT_TOKENIZER = WordTokenizer()


def word_span(kind: SpanKind, text: str) -> Span:
    token_ids = REPORT_TOKENIZER.encode(text)
    sampled = kind not in (SpanKind.PROMPT, SpanKind.OBSERVATION)
    return Span(kind, token_ids, (-0.5,) * len(token_ids) if sampled else None, sampled)


def city_rollout(
    answer: str | None = "Rome",
    *,
    instance_id: InstanceId = (0, 0),
    index: int = 0,
    queries: Sequence[str] = ("capital of Italy",),
    question: Question | None = None,
) -> Trajectory:
    """A rollout that asks `queries` and answers "Rome" (right), another city or nothing."""
    question = question or Question("q0", "where is Rome ?", ("Rome",), "toy")
    spans = [word_span(SpanKind.PROMPT, "where is Rome ?")]
    for query in queries:
        spans += [
            word_span(SpanKind.SCAFFOLD, "<search>"),
            word_span(SpanKind.QUERY, query),
            word_span(SpanKind.SCAFFOLD, "</search>"),
            word_span(SpanKind.OBSERVATION, "documents Rome is capital of Italy"),
        ]
    if answer is not None:
        spans += [
            word_span(SpanKind.SCAFFOLD, "<answer>"),
            word_span(SpanKind.ANSWER, answer),
            word_span(SpanKind.SCAFFOLD, "</answer>"),
        ]
    is_right = answer == "Rome"
    return Trajectory(
        question=question,
        instance_id=instance_id,
        rollout_index=index,
        spans=tuple(spans),
        stop_reason=StopReason.MAX_SEARCHES if answer is None else StopReason.ANSWERED,
        queries=tuple(queries),
        passages=tuple((Passage("d1", "Rome is capital of Italy", 0.75, {"url": "x"}),) for _ in queries),
        answer=answer,
        reward=float(is_right),
        advantage=0.5 if is_right else -0.5,
        label=Label.CORRECT if is_right else Label.INCORRECT,
    )


def credit(trajectory: Trajectory) -> tuple[TokenCredit, ...]:
    """Credit of each query: the first token suits the teacher, the last one is outside its top-k."""
    found = []
    for index, part in enumerate(trajectory.spans):
        if part.kind is SpanKind.QUERY:
            count = len(part.token_ids)
            teacher = (-0.25,) * (count - 1) + (-math.inf,)
            top = ((10, 0.6), (11, 0.3), (12, 0.1))
            found.append(TokenCredit(index, (0.1,) * count, (-0.5,) * count, teacher, (top,) * count))
    return tuple(found)


def write_records(path: Path, trajectories: Sequence[Trajectory], phase: str, step: int, **extra: Any) -> None:
    append_records(
        path, [make_record(t, REPORT_TOKENIZER.decode, phase=phase, step=step, **extra) for t in trajectories]
    )


def write_metrics(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)


def write_run(folder: Path) -> Path:
    """A run of 12 steps whose weight is on from step 2 and which learns to answer question 1."""
    rows: list[dict[str, float]] = []
    for step in range(12):
        if step == 0:
            rows.append({"step": 0, "epoch": 0} | validation(0.25))
        row = {"step": step, "epoch": 0, "rollout/reward": step / 12, "distill/weight": 0.3 if step >= 2 else 0.0}
        rows.append(row | ({"distill/jsd": 0.5 - 0.03 * step, "distill/teacher_rows": 10} if step >= 2 else {}))
    rows.append({"step": 12, "epoch": 0} | validation(0.75))
    write_metrics(folder, rows)

    path = folder / "trajectories.jsonl"
    for step, answer in ((0, "Oslo"), (12, "Rome")):
        for phase in ("val", "val_sampled"):
            pair = [city_rollout(instance_id=(0, 0)), city_rollout(answer, instance_id=(0, 1))]
            write_records(path, pair, phase, step)
    group = [city_rollout(instance_id=(0, 7), index=0), city_rollout("Oslo", instance_id=(0, 7), index=1)]
    for trajectory in group:
        write_records(path, [trajectory], "train", 2, block="[Rollout 1 | CORRECT]", credit=credit(trajectory))
    return folder


def validation(value: float) -> dict[str, float]:
    names = ("exact_match", "f1", "sampled_exact_match", "sampled_f1", "searches_per_question", "valid_action_rate")
    return {f"val/{name}": value for name in names} | {"val/questions": 2.0}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]  # U+2028 ends no line
