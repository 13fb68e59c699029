"""trajectories.jsonl, schema 1: one JSON line per rollout, written per batch and readable after any kill.

The file grows, and is cut where a run goes on from an earlier step. A line is complete exactly when it ends in a
newline: what follows the last newline was cut off by a kill, is never yielded, and is removed before the next append.
Should a rollout stand there twice, the last line of its (phase, step, instance_id, rollout_index) wins. Ranks write
their own files beside each other; what has become large is packed into segments (segments.py). docs/metrics.md lists
the fields.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdsearch_lightning.errors import DataError
from sdsearch_lightning.files import append_lines
from sdsearch_lightning.report.segments import numbered_lines, reopen_after, step_of
from sdsearch_lightning.types import Question, Span, TokenCredit, Trajectory

SCHEMA = 1
Record = dict[str, Any]
Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""


def rank_file(path: Path, rank: int) -> Path:
    """Where `rank` writes: `trajectories.jsonl` for rank 0, `trajectories.rank1.jsonl` for rank 1."""
    return path if rank == 0 else path.with_suffix(f".rank{rank}{path.suffix}")


def make_record(
    trajectory: Trajectory,
    decode: Decode,
    *,
    phase: str,
    step: int,
    rank: int = 0,
    block: str | None = None,
    credit: Sequence[TokenCredit] | None = None,
    top_tokens: int = 5,
) -> Record:
    """One rollout as a JSON object of schema 1; log-probs and credit are rounded to six decimals.

    Args:
        trajectory: the finished rollout.
        decode: makes the text of a span from its ids.
        phase: train, val, val_sampled, test, test_sampled, predict or predict_sampled.
        step: as in metrics.csv: n for the n-th training batch, and for an evaluation after n of them.
        rank: the process that ran it.
        block: the hindsight text that the teacher of this group read.
        credit: what the teacher said of the executed queries; None where no teacher was asked.
        top_tokens: how many of the teacher's most probable tokens to keep per position.
    """
    return {
        "schema": SCHEMA,
        "phase": phase,
        "step": step,
        "rank": rank,
        "question": _question(trajectory.question),
        "instance_id": trajectory.instance_id,
        "rollout_index": trajectory.rollout_index,
        "spans": [_span(span, decode) for span in trajectory.spans],
        "stop_reason": trajectory.stop_reason,
        "queries": trajectory.queries,
        "passages": [[asdict(passage) for passage in passages] for passages in trajectory.passages],
        "answer": trajectory.answer,
        "reward": trajectory.reward,
        "advantage": trajectory.advantage,
        "label": trajectory.label,
        "block": block,
        "credit": None
        if credit is None
        else [_credit(entry, trajectory.spans[entry.span], decode, top_tokens) for entry in credit],
        "query_credit": trajectory.query_credit,
        "query_advantages": trajectory.query_advantages,
    }


def _question(question: Question) -> Record:
    record = asdict(question)
    if question.normalization == "english":
        del record["normalization"]  # readers take it for granted
    if not question.support:
        del record["support"]
    return record


def _span(span: Span, decode: Decode) -> Record:
    return {
        "kind": span.kind,
        "text": decode(span.token_ids),
        "token_ids": span.token_ids,
        "sampled": span.sampled,
        "logprobs": None if span.logprobs is None else _rounded(span.logprobs),
    }


def _credit(credit: TokenCredit, span: Span, decode: Decode, top_tokens: int) -> Record:
    return {
        "span": credit.span,
        "tokens": token_texts(span.token_ids, decode),
        "jsd": _rounded(credit.jsd),
        "student_logprob": _rounded(credit.student_logprob),
        "teacher_logprob": _rounded(credit.teacher_logprob),
        "teacher_top": [
            [[decode([token]), round(probability, 6)] for token, probability in position[:top_tokens]]
            for position in credit.teacher_top
        ],
    }


def _rounded(values: Sequence[float]) -> list[float | None]:
    # JSON has no infinity; a top-k teacher gives a token outside its k the log-prob -inf.
    return [round(value, 6) if math.isfinite(value) else None for value in values]


def token_texts(token_ids: Sequence[int], decode: Decode) -> list[str]:
    """The text of each token such that they concatenate to the text of the run.

    A token alone may decode without its space, or to half a character; so each gets what it adds to the run's text.
    """
    text = decode(token_ids)
    ends = [0]
    for count in range(1, len(token_ids) + 1):
        ends.append(max(ends[-1], len(os.path.commonprefix([decode(token_ids[:count]), text]))))
    return [text[start:end] for start, end in zip(ends, ends[1:], strict=False)]


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Appends one line per record; they are on the disk when it returns."""
    # `default`: the fields of a user's passages may hold anything.
    append_lines(path, (json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records))


def cut_after(path: Path, step: int, every_n_steps: int | None = None) -> list[str]:
    """Removes, from `path` and the files of the other ranks beside it, what a run resumed after `step` writes again.

    Lines stand in the order of their steps, so those are the last ones, and the file is read from its end. Lines there
    that are no records, as a power cut leaves them, go too.

    Args:
        path: of rank 0.
        step: that the run goes on after.
        every_n_steps: training steps between two that are written, to find out which are missing; None: do not.

    Returns:
        What is missing afterwards, a line for each file.
    """
    expected = 0 if every_n_steps is None else (step - 1) // every_n_steps * every_n_steps + 1
    told = []
    for file_path in [path, *sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))]:
        packed, lost = reopen_after(file_path, step)
        told += lost
        if file_path.is_file():
            cut_torn_line(file_path)
            last, damaged = _cut_file(file_path, step)
            last = max(packed, last)
            if damaged or (file_path == path and last < expected):
                told.append(
                    f"{file_path} ends with step {last}, the run goes on after step {step}: rows between are lost "
                    f"({damaged} lines were no records and are cut; a power cut?)."
                )
    return told


def _cut_file(path: Path, step: int) -> tuple[int, int]:
    """The step that the file then ends with, and how many lines were no records."""
    last = damaged = 0
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        if not end:
            return last, damaged
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            while end > 0:
                start = lines.rfind(b"\n", 0, end - 1) + 1
                found = step_of(lines[start:end])
                if found is None:
                    damaged += 1
                elif found <= step:
                    last = found
                    break
                end = start
        file.truncate(end)
    return last, damaged


def cut_torn_line(path: Path) -> None:
    """Removes what follows the last newline, reading backwards: the file may be large."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def read_trajectories(path: str | Path) -> Iterator[Record]:
    """Rollouts of `path`, its segments and the other ranks' files beside it, each once: its last line wins.

    Streams the files twice, so memory grows with the number of rollouts and not with their length.

    Raises:
        DataError: a complete line that is no JSON object of schema 1, or a damaged segment; the message names it.
    """
    last = {_key(record): index for index, record in enumerate(_lines(Path(path)))}
    yield from (record for index, record in enumerate(_lines(Path(path))) if last.get(_key(record)) == index)


def _key(record: Record) -> tuple[Any, ...]:
    return (record["phase"], record["step"], *record["instance_id"], record["rollout_index"])


def _lines(path: Path) -> Iterator[Record]:
    for file in [path, *sorted(path.parent.glob(f"{path.stem}.rank*{path.suffix}"))]:
        yield from (_parse(line, place) for line, place in numbered_lines(file) if line.endswith(b"\n"))


def _parse(line: bytes, place: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: expected a JSON object, got {line[:60]!r}. Delete that line.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{place}: expected schema {SCHEMA}, got {found!r}. Was it written by another version?")
    return record
