"""One harness for every benchmark: interleaved timing, peak memory in fresh processes, bars on ratios, one report.

A script pins its threads before anything imports torch, checks that its variants compute the same, and only then times
them. Invariant: a bar is on a ratio of variants that ran in turn in one process, never on a lone time.

    python -m benchmarks.harness --peak module:function [argument ...]      (what `peak_memory` starts)
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "out"
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
THREADS["TOKENIZERS_PARALLELISM"] = "false"
PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "faiss-cpu", "sentence-transformers")
MEGABYTE = 1e6


def pin_threads() -> None:
    """One thread for all arithmetic. Call it before the first import of torch: libraries read this once.

    More threads than free cores cost several times the time, and which cores are free changes from run to run.
    """
    os.environ.update(THREADS)
    import torch

    torch.set_num_threads(1)


# Time


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one variant, a sample per repetition."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median."""
        return (max(self.samples) - min(self.samples)) / self.median


def compare(
    variants: Mapping[str, Callable[[], object]],
    repetitions: int = 3,
    warmup: int = 1,
    device: str = "cpu",
    wall: bool = False,
) -> dict[str, Timing]:
    """Time the variants in turn, A B A B, so that what else the machine does falls on all of them.

    Args:
        variants: what to call, by name.
        repetitions: of each, timed.
        warmup: of each, not timed.
        device: "cpu" counts the CPU time of the process, "cuda" the time between two events on the stream.
        wall: count wall time instead; for what waits.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(warmup + repetitions):
        for name, function in variants.items():
            gc.collect()
            seconds = _time(function, device, wall)
            if repetition >= warmup:
                samples[name].append(seconds)
    return {name: Timing(tuple(found)) for name, found in samples.items()}


def _time(function: Callable[[], object], device: str, wall: bool) -> float:
    if not device.startswith("cuda"):
        clock = time.perf_counter if wall else time.process_time
        start = clock()
        function()
        return clock() - start
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    function()
    after.record()
    torch.cuda.synchronize()
    return time.perf_counter() - started if wall else before.elapsed_time(after) / 1e3


# Memory


def peak_memory(function_path: str, *arguments: object) -> float:
    """Peak memory in MB that a function needs beyond its inputs, measured in a process of its own.

    The function is a generator: what stands before its one `yield` makes the inputs and is not counted, what follows
    is. It yields None, or the name of a CUDA device, whose allocator is then asked instead of the kernel.

    Args:
        function_path: `module:function`.
        arguments: numbers, strings or None.
    """
    command = [sys.executable, "-m", "benchmarks.harness", "--peak", function_path, *map(json.dumps, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | THREADS, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout.splitlines()[-1])


def _measure_peak(function_path: str, arguments: Sequence[object]) -> float:
    """MB between the state at the `yield` and the highest state after it, in this process."""
    pin_threads()
    import torch

    module, _, name = function_path.partition(":")
    steps = getattr(importlib.import_module(module), name)(*arguments)
    device = next(steps)
    gc.collect()
    if device is None:
        _forget_peak()
        before = _resident_peak()
        next(steps, None)
        return (_resident_peak() - before) / MEGABYTE
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    next(steps, None)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MEGABYTE


def _resident_peak() -> float:
    """Highest resident size in bytes. Linux starts `ru_maxrss` at the peak of the parent, so VmHWM comes first."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """Start the peak anew, where the kernel can: a set-up that peaks above its end would hide what follows."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


# Bars and reports


@dataclass(frozen=True, slots=True)
class Bar:
    """A ratio and what it has to reach. Missed only where the ratio of medians and that of minima both miss."""

    name: str
    median_ratio: float
    minimum_ratio: float
    at_least: float | None = None
    at_most: float | None = None

    @classmethod
    def of(
        cls, name: str, above: Timing, below: Timing, at_least: float | None = None, at_most: float | None = None
    ) -> Bar:
        """The bar on `above / below`."""
        return cls(name, above.median / below.median, above.minimum / below.minimum, at_least, at_most)

    @classmethod
    def counted(cls, name: str, ratio: float, at_least: float | None = None, at_most: float | None = None) -> Bar:
        """The bar on a ratio of counts, which has no noise."""
        return cls(name, ratio, ratio, at_least, at_most)

    @property
    def is_met(self) -> bool:
        return any(self._holds(ratio) for ratio in (self.median_ratio, self.minimum_ratio))

    @property
    def asked(self) -> str:
        """What is asked, for a table; empty where nothing is."""
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)

    def _holds(self, ratio: float) -> bool:
        above = self.at_least is None or ratio >= self.at_least
        return above and (self.at_most is None or ratio <= self.at_most)


@dataclass
class Report:
    """What a script found: rows for one table and one JSON file, with the environment they came from.

    Args:
        script: name of the file.
        settings: of the run, for the record.
    """

    script: str
    settings: Mapping[str, object] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, benchmark: str, bar: Bar, note: str = "") -> None:
        """Adds a ratio, with or without a bound."""
        verdict = ("met" if bar.is_met else "missed") if bar.asked else ""
        found = {"what": bar.name, "figure": bar.median_ratio, "minima": bar.minimum_ratio, "bar": bar.asked}
        self.rows.append({"benchmark": benchmark, **found, "verdict": verdict, "note": note})

    def finish(self) -> int:
        """Writes `benchmarks/out/<script>.json`, prints the table; the exit code, 1 where a bar was missed."""
        OUT.mkdir(parents=True, exist_ok=True)
        path = OUT / f"{self.script}.json"
        record = {"script": self.script, "settings": dict(self.settings), "environment": environment()}
        path.write_text(json.dumps(record | {"rows": self.rows}, indent=1) + "\n", encoding="utf-8")
        print(self.table() + f"\n\nwritten to {path.relative_to(ROOT)}", flush=True)
        return int(any(row["verdict"] == "missed" for row in self.rows))

    def table(self) -> str:
        """The rows, aligned."""
        heads = ("benchmark", "what", "figure", "minima", "bar", "verdict", "note")
        cells = [heads, *(tuple(_shown(row[head]) for head in heads) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def environment() -> dict[str, object]:
    """Where figures came from: versions, processor, threads, date and commit."""
    import torch

    installed = {package.name.lower(): package.version for package in importlib.metadata.distributions()}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: installed[name] for name in PACKAGES if name in installed},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit, marked where files differ from it."""
    commands = ("git rev-parse --short=12 HEAD", "git status --porcelain -uno")
    try:
        commit, changes = (subprocess.check_output(command.split(), cwd=ROOT, text=True) for command in commands)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("-dirty" if changes else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description="Peak memory of a function, MB.")
    parser.add_argument("--peak", required=True, metavar="MODULE:FUNCTION", help="a generator; see peak_memory")
    parser.add_argument("arguments", nargs="*", type=json.loads, help="its arguments, as JSON")
    options = parser.parse_args()
    print(_measure_peak(options.peak, options.arguments))
