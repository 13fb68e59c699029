"""Whole runs on a CUDA device: a cold start, then training arms from its model, with seconds by part and held-out EM.

Next: gpu.py, which runs them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
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
CURVES = {"val/exact_match", "val/valid_action_rate", "train/loss"}
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


STEPS, TINY_STEPS = 30, 3
GROUPS = ("--data.batch_size", "16", "--rollout.group_size", "4")
"""64 rollouts a step."""
GPU_COLD = ("--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed")


def real_facts(steps: int = STEPS) -> EndToEnd:
    """SmolLM2-135M on examples/real_facts, three arms; the files as gpu_carry.py unpacks them."""
    length = ("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps))
    whole = ("--data.limit_per_source", "null")
    return EndToEnd(
        cold=(*configs("real_facts_cold_start"), *GPU_COLD),
        fit=(*configs("real_facts", "real_facts_gpu"), *GROUPS, *length, *whole),
        arms={"sd_search": (), "grpo": configs("real_facts_grpo"), "best": configs("real_facts_best")},
        model="data/real_facts/SmolLM2-135M-Instruct.Q4_1.gguf",
    )


def quickstart(steps: int = TINY_STEPS) -> EndToEnd:
    """The same on the quick start's world, on any device; sizes that say nothing."""
    few = ("--data.num_val_questions", "8", "--rollout.eval_samples", "0", "--data.batch_size", "2")
    length = ("--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps))
    return EndToEnd(
        cold=(*configs("quickstart_cold_start"), "--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1"),
        fit=(*configs("quickstart"), *few, *length, "--rollout.max_tokens", "160"),
        arms={"grpo": ("--jsd.weight", "0"), "sd_search": ()},
    )


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
    for key in sorted(CURVES & metrics.keys()):
        found[f"{key}, first"], found[f"{key}, last"] = metrics[key][0].value, metrics[key][-1].value
    return found
