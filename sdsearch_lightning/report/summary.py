"""summary.json: a run in a few numbers, from metrics.csv and the facts that only the command line knows.

*before* is the validation at step 0 (after the cold start, before RL), *after* the last later validation; both are on
held-out questions. What was not measured is null, never 0.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sdsearch_lightning import __version__
from sdsearch_lightning.errors import DataError
from sdsearch_lightning.files import write_text
from sdsearch_lightning.report.metrics import Metrics, Point

JSD_WINDOW = 5
"""`jsd_first` and `jsd_last` are means over this many active steps at either end, or half of them if there are fewer
than ten."""
PACKAGES = (
    "torch",
    "lightning",
    "transformers",
    "torchmetrics",
    "sentence-transformers",
    "jsonargparse",
    "faiss-cpu",
    "faiss-gpu",
)

Summary = dict[str, Any]


def build_summary(metrics: Metrics, facts: dict[str, Any]) -> Summary:
    """The summary of a run.

    Args:
        metrics: curves of metrics.csv.
        facts: `seconds`, `seed`, `max_searches`, and optionally `questions`, `decoding`, `versions`; any other fact
            stands in the summary as it is.
    """
    rest = {key: value for key, value in facts.items() if key not in ("max_searches", "decoding", "versions")}
    return {
        "exact_match": _change(metrics, "val/exact_match"),
        "f1": _change(metrics, "val/f1"),
        "sampled": {
            "exact_match": _change(metrics, "val/sampled_exact_match"),
            "f1": _change(metrics, "val/sampled_f1"),
        },
        "questions": _questions(metrics),
        "searches_per_question": _change(metrics, "val/searches_per_question"),
        "valid_action_rate": _change(metrics, "val/valid_action_rate"),
        "sd": _self_distillation(metrics),
        "seconds": None,
        "seed": None,
        "decoding": {"greedy": True, "max_searches": facts.get("max_searches")} | facts.get("decoding", {}),
        "versions": facts.get("versions") or installed_versions(),
    } | rest


def _change(metrics: Metrics, key: str) -> dict[str, float | None]:
    points = metrics.get(key, [])
    before = next((index for index, point in enumerate(points) if point.step == 0), None)
    last = len(points) - 1
    return {
        "before": None if before is None else _number(points[before].value),
        "after": None if last < 0 or last == before else _number(points[last].value),
    }


def _questions(metrics: Metrics) -> int | None:
    points = metrics.get("val/questions", [])
    return int(points[-1].value) if points else None


def _self_distillation(metrics: Metrics) -> dict[str, float | int | None]:
    weights = _by_step(metrics.get("distill/weight", []))
    teacher_rows = _by_step(metrics.get("distill/teacher_rows", []))
    jsd = _by_step(metrics.get("distill/jsd", []))
    active = [step for step, weight in weights.items() if weight > 0]
    taught = [jsd[step] for step in sorted(active) if step in jsd and teacher_rows.get(step, 1) > 0]
    window = min(JSD_WINDOW, max(1, len(taught) // 2))
    return {
        "weight": _number(max(weights.values(), default=0.0)),
        "active_steps": len(active),
        "jsd_first": _mean(taught[:window]),
        "jsd_last": _mean(taught[-window:]),
        "steps": len(weights) or len(_by_step(metrics.get("rollout/reward", []))),
        "teacher_rows": int(sum(teacher_rows.values())),
    }


def _by_step(points: Sequence[Point]) -> dict[int, float]:
    return {point.step: point.value for point in points if math.isfinite(point.value)}


def _mean(values: Sequence[float]) -> float | None:
    return _number(sum(values) / len(values)) if values else None


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None  # JSON has no NaN


def installed_versions() -> dict[str, str]:
    """Versions of Python, this library and the packages that decide a result; an absent package is left out."""
    versions = {"python": platform.python_version(), "sdsearch_lightning": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def write_summary(run_folder: Path, summary: Summary) -> None:
    """Write the summary as `run_folder/summary.json`, which marks a run as finished."""
    write_text(run_folder / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def read_summary(run_folder: Path) -> Summary | None:
    """The summary of a finished run; None where there is none yet.

    Raises:
        DataError: it is damaged.
    """
    path = run_folder / "summary.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        told = f"{path}: expected a JSON object ({error}). Delete it; the run's command writes it again."
        raise DataError(told) from error
