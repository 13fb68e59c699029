"""What page and terminal show of a rollout: its rows, and for each query the numbers that judge it.

A view is JSON: text without control characters, numbers that are finite or null. Both readers of trajectories.jsonl
show these values and compute none of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sdsearch_lightning.report.example import Row, harmless, is_correct, printable, rows
from sdsearch_lightning.report.trajectories import Record

MAX_TEXT = {"OBSERVATION": 1200}
"""Characters of a row that are shown, by its kind; of any other kind `MAX_OTHER_TEXT`."""
MAX_OTHER_TEXT = 4000
MAX_BLOCK = 6000
"""Characters of a hindsight block that are shown."""
UNRELIABLE = 0.01
"""Where student and teacher both give a token less, their ratio is that of two small errors: shown, and marked."""

View = dict[str, Any]


def is_right(record: Record) -> bool:
    """Whether the rollout counts as right: by its label, which teachers and group filters read; else by exact match."""
    return is_correct(record) if record["label"] is None else record["label"] == "CORRECT"


def group_head(record: Record) -> View:
    """What the rollouts of a group share, from one of them; `rollouts` is empty."""
    question = record["question"]
    return {
        "phase": family(record["phase"]),
        "step": record["step"],
        "instance": list(record["instance_id"]),
        "question": printable(question["text"]),
        "gold": [printable(str(answer)) for answer in question["answers"]],
        "source": printable(str(question.get("source") or "")),
        "rollouts": [],
    }


def family(phase: str) -> str:
    """The phase whose question this is: greedy and sampled rollouts of an evaluation stand side by side."""
    return phase.removesuffix("_sampled")


def rollout_view(record: Record) -> View:
    """One rollout; `decoding`, `reward`, `advantage` and `block` are left out where there are none."""
    view = {
        "index": record["rollout_index"],
        "right": is_right(record),
        "verdict": _verdict(record),
        "rows": _row_views(record),
        "decoding": _decoding(record["phase"]),
        "reward": _finite(record["reward"]),
        "advantage": _finite(record["advantage"]),
        "block": _block(record["block"]),
    }
    return {name: value for name, value in view.items() if value not in (None, "")}


def opening(groups: Sequence[View]) -> int:
    """Where a reader opens, as an index: the group with right and wrong rollouts whose queries were judged most
    differently; else the first of a training; else the first.
    """
    spreads = [_spread(group) for group in groups]
    if any(spreads):
        return spreads.index(max(spreads))
    return next((index for index, group in enumerate(groups) if group["phase"] == "train"), 0)


def _spread(group: View) -> float:
    queries = [row["query"] for view in group["rollouts"] for row in view["rows"] if "query" in row]
    judged = [query.get("verdict", query.get("credit")) for query in queries if not query.get("doubtful")]
    values = [value for value in judged if value is not None]
    return max(values) - min(values) if values and group["outcome"] == "mixed" else 0.0


def _decoding(phase: str) -> str:
    if phase in ("train", "skipped"):
        return ""  # always sampled: siblings go by their number
    return "sampled" if phase.endswith("_sampled") else "greedy"


def outcome(rights: Sequence[bool]) -> str:
    """`right`, `wrong` or `mixed`, of the rollouts of a group."""
    return "mixed" if len(set(rights)) > 1 else "right" if any(rights) else "wrong"


def _verdict(record: Record) -> str:
    if record["answer"] is None:
        return "no answer: " + printable(str(record["stop_reason"]).lower().replace("_", " "))
    if is_right(record) == is_correct(record):
        return "right" if is_right(record) else "wrong"
    return "right, no exact match" if is_right(record) else "wrong, though an exact match"


def _block(block: str | None) -> str | None:
    if block is None:
        return None
    return "\n".join(harmless(line) for line in block[:MAX_BLOCK].split("\n")) + (" ..." if block[MAX_BLOCK:] else "")


def _row_views(record: Record) -> list[View]:
    queries = [index for index, span in enumerate(record["spans"]) if span["kind"] == "QUERY"]
    credit = {entry["span"]: entry for entry in record["credit"] or ()}
    shown = []
    for row in rows(record):
        limit = MAX_TEXT.get(row.kind, MAX_OTHER_TEXT)
        view: View = {"kind": row.kind, "text": row.text[:limit]}
        if len(row.text) > limit:
            view["cut"] = len(row.text) - limit
        if row.kind == "QUERY":
            view["query"] = _query_view(row, record, queries.index(row.span), credit.get(row.span))
        shown.append(view)
    return shown


def _query_view(row: Row, record: Record, number: int, credit: Record | None) -> View:
    """`number`: of the query among the executed ones of the rollout, from 0."""
    view: View = {}
    for name, key in (("credit", "query_advantages"), ("value", "query_credit")):
        values = record.get(key) or ()
        if number < len(values):
            view[name] = _finite(values[number])
    return view | ({} if credit is None else token_view(credit))


def token_view(credit: Record) -> View:
    """The teacher's verdict on a query: per token, and as numbers of the whole.

    Returns:
        Lists of one value per token: `tokens`, `student` and `teacher` (log-probs of what was written; null: outside
        the teacher's top-k), `jsd` (nats), `top` (the teacher's first choices and their probabilities).
        `verdict`: mean of teacher minus student over the tokens that have both; null where none has. `mean_jsd`.
        Where there is something to tell: `outside`: how many tokens the teacher's top-k lacks; `unreliable`: places of
        such tokens; `doubtful`: they make most of the verdict.
    """
    student, teacher = ([_finite(value) for value in credit[f"{who}_logprob"]] for who in ("student", "teacher"))
    jsd = [_finite(value) for value in credit["jsd"]]
    pairs = list(enumerate(zip(student, teacher, strict=True)))
    unreliable = [i for i, (s, t) in pairs if is_unreliable(s, t)]
    judged = {i: t - s for i, (s, t) in pairs if s is not None and t is not None}
    doubt = sum(abs(judged.get(i, 0.0)) for i in unreliable)
    always = {
        "tokens": [harmless(token) for token in credit.get("tokens") or ("?",) * len(jsd)],
        "student": student,
        "teacher": teacher,
        "jsd": jsd,
        "top": [[[harmless(str(text)), _finite(p)] for text, p in position] for position in credit["teacher_top"]],
        "verdict": _mean(list(judged.values())),
        "mean_jsd": _mean([value for value in jsd if value is not None]),
    }
    sometimes = {
        "unreliable": unreliable,
        "outside": sum(value is None for value in teacher),
        "doubtful": doubt > sum(map(abs, judged.values())) / 2,
    }
    return always | {name: value for name, value in sometimes.items() if value}


def is_unreliable(student: float | None, teacher: float | None) -> bool:
    """Whether both probabilities of a token (log-probs here; None: none) are near 0."""
    return all(value is None or math.exp(value) < UNRELIABLE for value in (student, teacher))


def _mean(values: Sequence[float]) -> float | None:
    return _finite(sum(values) / len(values)) if values else None


def _finite(value: Any) -> float | None:
    """A number of the file with four decimals; null for what is none: the file may come from elsewhere."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return round(value, 4) if is_number else None
