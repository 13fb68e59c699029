"""Evaluations of a run's checkpoint, and the form that the hub has for them: `model-index` in a card's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdsearch_lightning.report.evaluation import Evaluation, read_evaluations


def evaluations_of(run: Path, step: int) -> list[Evaluation]:
    """Evaluations of a run's checkpoint of this step: those in folders that are named after it."""
    return [found for folder, found in read_evaluations(run) if folder.name == f"step_{step:08d}"]


def eval_results(evaluation: Evaluation) -> list[Any]:
    """The greedy scores of each source as the hub has them; a macro average has no data set."""
    from huggingface_hub import EvalResult

    limits = evaluation["decoding"]
    how = {"decoding": "greedy", "max_searches": limits["max_searches"], "top_k": limits["top_k"]}
    results = []
    for source in evaluation["sources"]:
        data_set = source.get("data_set") or {"name": source["source"], "config": None, "split": None}
        for metric, name in (("exact_match", "EM"), ("f1", "F1")):
            interval = {"low_95": source[metric]["low"], "high_95": source[metric]["high"]}
            results.append(
                EvalResult(
                    task_type="question-answering",
                    task_name="open-domain question answering by search",
                    dataset_type=data_set["name"],
                    dataset_name=source["source"],
                    dataset_config=data_set["config"],
                    dataset_split=data_set["split"],
                    metric_type=metric,
                    metric_name=name,
                    metric_value=source[metric]["value"],
                    metric_args=how | interval | {"questions": source["questions"], "step": evaluation["step"]},
                )
            )
    return results
