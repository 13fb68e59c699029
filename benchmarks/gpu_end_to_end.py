"""Whole runs on a CUDA device: a cold start, then training arms from its model, with seconds by part and held-out EM.

Next: gpu.py, which runs them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory

from benchmarks.harness import ROOT
from sdsearch_lightning.report.metrics import read_metrics

PARTS = (
    "rollout/seconds",
    "search/seconds",
    "train/student_seconds",
    "train/teacher_seconds",
    "train/optimizer_seconds",
    "rollout/tokens_per_second",
)
CURVES = {"val/exact_match", "val/sampled_exact_match", "val/valid_action_rate", "train/loss"}
AREA = "rollout/exact_match"
"""Its mean over the steps tells arms apart that end alike."""
WARMUP_STEPS = 2
"""Not counted: they record graphs and tune kernels."""


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """Runs that belong together.

    Args:
        cold: options of `supervise`.
        fit: options of `fit` that all arms share.
        arms: of each arm, options beyond these; the last counts.
        model: from the root of the repository, what the cold start learns from; None: what its files say.
    """

    cold: tuple[str, ...]
    fit: tuple[str, ...]
    arms: Mapping[str, tuple[str, ...]]
    model: str | None = None

    def commands(self, root: str) -> dict[str, list[str]]:
        """The commands under a folder for runs, by name, in the order in which they run."""
        shared = ["--run.root", root, "--trainer.enable_progress_bar", "false"]
        made = ["--model.model_name_or_path", self.model] if self.model else []
        cold = ["supervise", *self.cold, *made, *shared, "--run.name", "cold_start"]
        start = ["--model.model_name_or_path", f"{root}/cold_start/model"]
        arms = {
            name: ["fit", *self.fit, *options, *start, *shared, "--run.name", name]
            for name, options in self.arms.items()
        }
        return {"cold_start": cold} | arms


def configs(*names: str) -> tuple[str, ...]:
    """`--config` for each of these files of configs/."""
    return tuple(part for name in names for part in ("--config", f"configs/{name}.yaml"))


STEPS = 30
GROUPS = ("--data.batch_size", "16", "--rollout.group_size", "4")
"""64 rollouts a step."""
GPU = ("--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed")
WORLD = "experiment/world/large"
TINY_MODEL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
TINY_MODEL |= {"num_key_value_heads": 2, "head_dim": 16}


def real_facts(steps: int = STEPS) -> EndToEnd:
    """SmolLM2-135M on examples/real_facts, three arms; the files as gpu_carry.py unpacks them."""
    length = ("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps))
    whole = ("--data.limit_per_source", "null")
    return EndToEnd(
        cold=(*configs("real_facts_cold_start"), *GPU),
        fit=(*configs("real_facts", "real_facts_gpu"), *GROUPS, *length, *whole),
        arms={"sd_search": (), "grpo": configs("real_facts_grpo"), "best": configs("real_facts_best")},
        model="data/real_facts/SmolLM2-135M-Instruct.Q4_1.gguf",
    )


def world_20m(steps: int = STEPS) -> EndToEnd:
    """A policy of 20M parameters from random weights in a large world, three arms without a teacher."""
    length = ("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps))
    cold, fit = configs("quickstart_cold_start", WORLD, f"{WORLD}_model"), configs("quickstart", WORLD, f"{WORLD}_fit")
    return EndToEnd(
        cold=(*cold, *GPU),
        fit=(*fit, *GPU, *length),
        arms={
            "grpo": configs("experiment/study/grpo"),
            "best": configs("experiment/preset/best"),
            "entropy_penalty": configs("experiment/study/entropy_penalty"),
        },
    )


def tiny(runs: EndToEnd) -> EndToEnd:
    """These runs in an embedded world, at sizes that say nothing, on a CPU."""
    shared = ("--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--data.num_entities", "60")
    model = tuple(part for name, size in TINY_MODEL.items() for part in (f"--model.scratch.options.{name}", str(size)))
    few = ("--data.num_val_questions", "8", "--rollout.eval_samples", "0", "--data.batch_size", "2")
    steps = ("--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--rollout.max_tokens", "160")
    cold = (*shared, *model, "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1", "--data.batch_size", "8")
    return replace(runs, cold=(*runs.cold, *cold), fit=(*runs.fit, *shared, *few, *steps))


def end_to_end(runs: EndToEnd, root: Path) -> Iterator[dict[str, float]]:
    """Runs everything in `root`; yields the seconds of each command, and of each arm what its metrics say.

    Raises:
        RuntimeError: a command failed.
    """
    for name, command in runs.commands(str(root)).items():
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "sdsearch_lightning", *command], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
        yield {f"{name}: seconds of the command": time.monotonic() - start}
        yield {f"{name}: {key}": value for key, value in figures(root / name).items()}


def end_to_end_aside(runs: EndToEnd) -> Iterator[dict[str, float]]:
    """`end_to_end` in a folder that is removed afterwards."""
    with TemporaryDirectory(prefix="sdsearch-") as root:
        yield from end_to_end(runs, Path(root))


def figures(folder: Path) -> dict[str, float]:
    """Of a finished run: medians over steps of its parts, held-out EM before and after, or the loss of a cold start."""
    metrics = read_metrics(folder)
    found = {}
    for key in PARTS:
        values = [point.value for point in metrics.get(key, []) if point.step > WARMUP_STEPS]
        if values:
            found[f"{key}, median of {len(values)} steps"] = median(values)
    if AREA in metrics:
        found[f"{AREA}, mean over steps"] = fmean(point.value for point in metrics[AREA])
    for key in sorted(CURVES & metrics.keys()):
        found[f"{key}, first"], found[f"{key}, last"] = metrics[key][0].value, metrics[key][-1].value
    return found
