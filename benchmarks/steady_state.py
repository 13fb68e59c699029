"""What a long run leaves in its process: memory and descriptors by step, and threads before and after.

    python -m benchmarks.steady_state                      # 200 steps

The run is that of kill_and_resume.py with 200 steps, a checkpoint each 10th and a validation each 50th, in this process
and on one thread. A short run comes first, for what is made once. The slopes are those of a line through the steps
after the first quarter; what grows for ever shows there, what is made once does not. Exit code 1 tells that something
grows.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import threading
from collections.abc import Collection, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.harness import pin_threads
from benchmarks.kill_and_resume import Arena

PAGE = os.sysconf("SC_PAGE_SIZE")
SEEN: list[Sample] = []
"""What `Sampler` saw of the newest run."""
GROWTH = 16.0
"""Kilobytes that a step may leave behind: 200 000 steps would then take 3 GB."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The process after a step."""

    step: int
    resident: int
    """Bytes."""
    descriptors: int
    threads: int

    @staticmethod
    def now(step: int) -> Sample:
        """The process as it is."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
        return Sample(step, resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


class Sampler(Callback):
    """Looks at the process after each step; garbage is collected before, so that its moments do not count."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SEEN.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        gc.collect()
        SEEN.append(Sample.now(trainer.global_step))


def slope(samples: Sequence[Sample], quantity: str) -> float:
    """What a quantity grows by per step, after the first quarter of the steps."""
    late = [sample for sample in samples if sample.step > samples[-1].step / 4]
    return linear_regression([s.step for s in late], [getattr(s, quantity) for s in late]).slope


def run(name: str, steps: int, seed: int) -> None:
    """A whole `fit` in this process and this folder.

    Raises:
        SystemExit: it failed.
    """
    from sdsearch_lightning.__main__ import main as command_line

    trainer = {"max_steps": steps, "val_check_interval": max(1, steps // 4)}
    options = {"run.name": name, "run.checkpoint_every": 10, "seed_everything": seed}
    options |= {f"trainer.{key}": value for key, value in trainer.items()}
    options["trainer.callbacks+"] = "benchmarks.steady_state.Sampler"
    code = command_line(["fit", "--config", "fit.yaml", *(f"--{key}={value}" for key, value in options.items())])
    if code:
        raise SystemExit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    pin_threads()
    from benchmarks.steady_state import SEEN as seen  # this file is __main__, the sampler's module has its name

    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(Path(folder), None)
        arena.write()
        arena.start(["supervise", "--config", "cold.yaml"], check=True)
        with chdir(folder):
            run("short", 4, options.seed)
            gc.collect()
            names, before = {thread.name for thread in threading.enumerate()}, Sample.now(0)
            run("long", options.steps, options.seed)
            gc.collect()
            after = Sample.now(options.steps)
    left = {thread.name for thread in threading.enumerate()} - names
    print(f"\n{options.steps} steps after a run of 4, seed {options.seed}")
    return int(tell(list(seen), before, after, left))


def tell(samples: Sequence[Sample], before: Sample, after: Sample, left: Collection[str]) -> bool:
    """Prints what grew during a run, and by how much; whether something did."""
    first, last = next(s for s in samples if s.step > samples[-1].step / 4), samples[-1]
    kilobytes, descriptors = slope(samples, "resident") / 1e3, slope(samples, "descriptors")
    sizes = f"{first.resident / 1e6:.1f} -> {last.resident / 1e6:.1f} MB (ratio {last.resident / first.resident:.4f})"
    print(f"resident memory, step {first.step} -> {last.step}: {sizes}, {kilobytes:+.2f} KB a step")
    print(f"descriptors: {first.descriptors} -> {last.descriptors}, {descriptors:+.4f} a step; "
          f"before the run {before.descriptors}, after it {after.descriptors}")  # fmt: skip
    print(
        f"threads: before the run {before.threads}, after it {after.threads}; left: {', '.join(sorted(left)) or 'none'}"
    )
    is_left = after.threads > before.threads or after.descriptors > before.descriptors
    return is_left or kilobytes > GROWTH or descriptors > 0.01


if __name__ == "__main__":
    sys.exit(main())
